"""One way in: a run, a Hugging Face directory or the name of a model to talk to becomes model and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from baleen.config import UserError
from baleen.data.tokenizer import Tokenizer
from baleen.interop import smollm2
from baleen.interop.checkpoint import PICKLES
from baleen.interop.huggingface import load_model
from baleen.model.transformer import Transformer


class Loaded(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    path: Path  # of the model's own directory or file


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Loaded:
    """The model at `path`: a run directory (its model/), a Hugging Face directory, or `smollm2`.

    The model is in evaluation mode; `dtype` None: as on disk. Raises UserError where there is nothing to load.
    """
    path = model_path(path)
    return Loaded(load_model(path, dtype=dtype, device=device).eval(), Tokenizer.load(path), path)


def model_path(path: str | Path) -> Path:
    """Where the weights of RUN are. Raises UserError for what is neither a run nor a model."""
    if str(path) == smollm2.NAME and not Path(path).exists():
        return smollm2.smollm2_directory()
    path = Path(path)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "config.json").is_file():
        return path
    if path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file: `baleen upcycle {path} OUT` makes a V3 model of a Llama")
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code when it is opened: Baleen reads safetensors")
    if (path / "recipe.toml").is_file():
        raise UserError(f"{path} has no model yet: finish it with `baleen train ... --run {path} --resume`")
    if path.is_dir():
        raise UserError(f"{path} has neither model/config.json nor config.json: give a run or a model directory")
    raise UserError(f"{path} is neither a run directory nor a Hugging Face model directory, nor `{smollm2.NAME}`")
