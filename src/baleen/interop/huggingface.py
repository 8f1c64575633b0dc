"""Checkpoints in Hugging Face's layout for `deepseek_v3`: models and streams of tensors written and loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from baleen.config import ModelConfig, model_config_to_hf
from baleen.interop.checkpoint import SCALE, Checkpoint, TensorStream
from baleen.interop.names import CORRECTION_BIAS, EMBEDDING, HEAD, Layout
from baleen.interop.shards import ShardWriter, Spec, replaced_when_complete
from baleen.model.fp8 import E4M3, WEIGHT_BLOCK, quantize_blocks, scale_shape
from baleen.model.transformer import Transformer

ScaleFormat = Literal["fp32", "ue8m0"]
# What goes with the weights when a checkpoint is copied from folder to folder, as patterns of names.
LICENCES = ("LICENSE*", "NOTICE*")  # V3 has LICENSE-MODEL and LICENSE-CODE
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "tiktoken.model", "tokenization_*.py", "README.md", *LICENCES,
)  # fmt: skip
DTYPE_WORDS = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class SavesTokenizer(Protocol):
    def save(self, directory: Path) -> None: ...


def load_model(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """A model from per-expert or stacked tensors, in one file or in shards; `dtype` None: as on disk.

    Raises UserError as `Checkpoint` does.
    """
    checkpoint = Checkpoint(directory)
    return model_from_stream(checkpoint.config, checkpoint.tensors(), dtype or checkpoint.dtype, device)


def model_from_stream(
    config: ModelConfig, tensors: TensorStream, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Transformer:
    """Fill a new model; every tensor must come once (copies left out)."""
    with torch.device("meta"):
        model = Transformer(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary.reset_parameters()
    state, layout = model.state_dict(), Layout(config)
    awaited = set(layout.originals())
    for name, tensor in tensors:
        awaited.remove(name)
        place = layout.places[name]
        place.of(state[place.name]).copy_(tensor)
    assert not awaited, f"the stream ended without {sorted(awaited)[:3]}"
    return model


def model_stream(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by their names on disk, as views."""
    state, layout = model.state_dict(), Layout(model.config)
    for name in layout.originals():
        place = layout.places[name]
        yield name, place.of(state[place.name])


def save_model(
    model: Transformer,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: SavesTokenizer | None = None,
    generation: Mapping[str, Any] | None = None,
    card: str | None = None,
    fp8: ScaleFormat | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json, *.safetensors, generation_config.json and what else is given; a model there is replaced.

    dtype: of the weights on disk, None: as in memory; the correction bias stays float32. generation: further keys for
    generation_config.json, such as {"temperature": 0.6}. card: text of README.md. fp8: matrices of attention and MLPs
    in 128 x 128 blocks of E4M3, with float32 scales or scales that are powers of 2. Written aside, then renamed: after
    an error (a full disk) the directory is as it was.
    """
    kind = dtype or model.model.norm.weight.dtype
    specs = {name: Spec(kind, tuple(tensor.shape)) for name, tensor in model_stream(model)}
    with replaced_when_complete(Path(directory)) as aside:
        write_weights(aside, model.config, model_stream(model), specs, fp8=fp8, max_shard_bytes=max_shard_bytes)
        write_generation(aside, model.config, generation or {})
        if tokenizer is not None:
            tokenizer.save(aside)
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")


def write_weights(
    directory: Path,
    config: ModelConfig,
    tensors: TensorStream,
    specs: Mapping[str, Spec],
    *,
    fp8: ScaleFormat | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """config.json and *.safetensors from a stream, in the dtypes of `specs` (the correction bias in float32).

    fp8: see `save_model`.
    """
    specs = {name: _kept_wide(name, spec) for name, spec in specs.items()}
    layout = Layout(config)
    copies = {name: layout.copies(name) for name in (EMBEDDING, HEAD)}
    specs |= {copy: specs[name] for name, names in copies.items() for copy in names}
    words = model_config_to_hf(config) | {"torch_dtype": DTYPE_WORDS[specs[EMBEDDING].dtype]}
    if fp8 is not None:
        specs = _with_fp8(specs)
        words["quantization_config"] = _quantization_config(fp8)
    write_json(directory / "config.json", dict(sorted(words.items())))
    with ShardWriter(directory, specs, max_shard_bytes) as writer:
        for name, tensor in tensors:
            if fp8 is not None and specs[name].dtype == E4M3:
                tensor, scale = quantize_blocks(tensor, WEIGHT_BLOCK, power_of_two=fp8 == "ue8m0")
                writer.write(name + SCALE, scale)
            for target in (name, *copies.get(name, ())):
                writer.write(target, tensor)


def copy_companions(source: Path, target: Path, patterns: Sequence[str] = COMPANIONS) -> None:
    """Tokenizer, template, generation settings and licence of a checkpoint; of a file that is one, nothing."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_generation(directory: Path, config: ModelConfig, settings: Mapping[str, Any] = MappingProxyType({})) -> None:
    """generation_config.json: where answers begin and end, and `settings` such as {"temperature": 0.6}."""
    sampling = {"do_sample": True} if settings.keys() & {"temperature", "top_p", "top_k", "min_p"} else {}
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(directory / "generation_config.json", ends | sampling | dict(settings))


def _kept_wide(name: str, spec: Spec) -> Spec:
    return Spec(torch.float32, spec.shape) if name.endswith(CORRECTION_BIAS) else spec


def _with_fp8(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """As the released checkpoints: every matrix of attention and MLPs; not gate, embedding, head and eh_proj."""
    out: dict[str, Spec] = {}
    for name, spec in specs.items():
        inside = ".self_attn." in name or ".mlp." in name
        if inside and len(spec.shape) == 2 and not name.endswith("mlp.gate.weight"):
            out[name] = Spec(E4M3, spec.shape)
            out[name + SCALE] = Spec(torch.float32, scale_shape(spec.shape, WEIGHT_BLOCK))
        else:
            out[name] = spec
    return out


def _quantization_config(fp8: ScaleFormat) -> dict[str, Any]:
    words = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    scales = {"scale_fmt": "ue8m0"} if fp8 == "ue8m0" else {}
    return {**words, **scales, "weight_block_size": list(WEIGHT_BLOCK)}
