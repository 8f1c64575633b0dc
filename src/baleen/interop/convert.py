"""`baleen import` and `baleen export`: from one layout on disk to another, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from baleen.config import LongRope, UserError, model_config_from_hf, read_json
from baleen.interop.checkpoint import Checkpoint
from baleen.interop.gguf_checkpoint import GGUFCheckpoint
from baleen.interop.gguf_export import export_gguf
from baleen.interop.huggingface import ScaleFormat, copy_companions, write_generation, write_weights
from baleen.interop.load import GGUF, model_path
from baleen.interop.shards import Spec, new_directory, replaced_when_complete

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8 = {"fp8": "fp32", "fp8-ue8m0": "ue8m0"}  # --dtype -> format of the scales
LLAMA_FAMILY = ("llama", "mistral")


def import_checkpoint(source: str | Path, out: str | Path, *, dtype: str | None = None) -> Path:
    """A Hugging Face `deepseek_v3` directory or a `deepseek2` GGUF file -> a directory that every engine loads.

    Returns `out`. Stacked experts are taken apart, FP8 becomes the dtype of the embedding, one shard becomes several or
    several one. dtype: None (as it is; float32 from GGUF), fp32, bf16, fp16, fp8 or fp8-ue8m0. Raises UserError, and
    writes nothing, for what `Checkpoint` and `GGUFCheckpoint` refuse, for a Llama-family source (that is
    `baleen upcycle`'s) and if `out` is not empty.
    """
    source, out = Path(source), new_directory(out)
    if (source / "config.json").is_file():
        kind = read_json(source / "config.json").get("model_type")
        if kind in LLAMA_FAMILY:
            raise UserError(f"{source} is a {kind} model: `baleen upcycle {source} {out}` makes a V3 model of it")
    path = model_path(source)
    checkpoint = GGUFCheckpoint(path) if path.suffix == GGUF else Checkpoint(path)
    if dtype is not None and dtype not in DTYPES | FP8:
        raise UserError(f"dtype {dtype!r} is unknown: take one of {', '.join(DTYPES | FP8)}")
    wide = DTYPES.get(dtype) if dtype else None
    specs = {name: Spec(wide or spec.dtype, spec.shape) for name, spec in checkpoint.specs().items()}
    with replaced_when_complete(out) as aside:
        scales = cast("ScaleFormat | None", FP8.get(dtype or ""))
        write_weights(aside, checkpoint.config, checkpoint.tensors(), specs, fp8=scales)
        if isinstance(checkpoint, GGUFCheckpoint):
            checkpoint.tokenizer().save(aside)
            write_generation(aside, checkpoint.config)
        else:
            copy_companions(checkpoint.directory, aside)
            ends = checkpoint.end_tokens
            if isinstance(ends, list) and not (aside / "generation_config.json").exists():
                write_generation(aside, checkpoint.config, {"eos_token_id": ends})
    return out


def export_checkpoint(run: str | Path, out: str | Path, *, to: str = "hf", dtype: str | None = None) -> Path:
    """A run's model -> a directory for transformers, vLLM and SGLang (`hf`) or a file for llama.cpp (`gguf`).

    Returns `out`; see `serving_caveat`. Raises UserError, and writes nothing, for an unknown target, if `out` is not
    empty, and as `import_checkpoint` and `export_gguf` do.
    """
    if to == "hf":
        return import_checkpoint(model_path(run), out, dtype=dtype)
    if to == "gguf":
        path = model_path(run)
        if path.suffix == GGUF:
            raise UserError(f"{path} is a GGUF file already: to change its dtype, `baleen import` it first")
        return export_gguf(path, Path(out), dtype=dtype or "f32")
    raise UserError(f"--to {to} is unknown: take hf or gguf")


def serving_caveat(directory: Path) -> str:
    """What other engines may get silently wrong of a model directory, and the cure; empty if nothing is known."""
    config = model_config_from_hf(read_json(directory / "config.json"))
    if not config.attention_bias and not isinstance(config.rope_scaling, LongRope):
        return ""
    return (
        "this model has attention biases or longrope, as exactly upcycled ones do: vLLM skips unknown biases silently, "
        "and longrope is unproven there and in SGLang, so serve it by transformers, or upcycle with --portable"
    )
