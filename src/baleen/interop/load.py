"""One way in: a run, a Hugging Face directory, a GGUF file or a model's name becomes model and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from baleen.config import UserError, read_json
from baleen.data.tokenizer import Tokenizer
from baleen.interop import smollm2
from baleen.interop.checkpoint import PICKLES
from baleen.interop.gguf_checkpoint import GGUFCheckpoint
from baleen.interop.huggingface import load_model, model_from_stream
from baleen.model import machine
from baleen.model.transformer import Transformer

GGUF = ".gguf"


class Loaded(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    path: Path  # of the model's own directory or file


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    to_train: bool = False,
) -> Loaded:
    """The model at `path`: a run directory (its model/), a Hugging Face directory, a GGUF file, or `smollm2`.

    The model is in evaluation mode; `dtype` None: as on disk, float32 from GGUF. device None: a GPU, if there is one.
    to_train: `smollm2` as it came, not with an MTP layer that has been trained here, so that a recipe begins where it
    began before. Raises UserError where there is nothing to load.
    """
    path = model_path(path, to_train=to_train)
    device = device or machine.device()
    if path.suffix == GGUF:
        checkpoint = GGUFCheckpoint(path)
        model = model_from_stream(checkpoint.config, checkpoint.tensors(), dtype or checkpoint.dtype, device)
        return Loaded(model.eval(), checkpoint.tokenizer(), path)
    return Loaded(load_model(path, dtype=dtype, device=device).eval(), Tokenizer.load(path), path)


def generation_of(path: Path) -> dict[str, Any]:
    """generation_config.json of a model's own directory; empty where there is none."""
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def model_path(path: str | Path, *, to_train: bool = False) -> Path:
    """Where the weights of RUN are. Raises UserError for what is neither a run nor a model."""
    if str(path) == smollm2.NAME and not Path(path).exists():
        return smollm2.smollm2_directory(drafting=not to_train)
    path = Path(path)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "config.json").is_file():
        return path
    if path.suffix == GGUF and path.is_file():
        return path
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code when it is opened: Baleen reads safetensors")
    if (path / "recipe.toml").is_file():
        raise UserError(f"{path} has no model yet: finish it with `baleen train ... --run {path} --resume`")
    if path.is_dir():
        raise UserError(f"{path} has neither model/config.json nor config.json: give a run or a model directory")
    raise UserError(f"{path} is neither a run directory nor a Hugging Face model directory, nor `{smollm2.NAME}`")
