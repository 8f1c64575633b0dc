"""Llama-family checkpoints, from a Hugging Face directory or a GGUF file: what upcycling starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from baleen.config import UserError, read_json
from baleen.data.tokenizer import Tokenizer
from baleen.interop.checkpoint import PLAIN_DTYPES, weight_files
from baleen.interop.gguf_file import GGUFFile
from baleen.interop.gguf_tokenizer import tokenizer_from_gguf
from baleen.interop.shards import Shard

# The layer's tensors: Hugging Face name -> GGUF name.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class LlamaShape(NamedTuple):
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # I
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # n
    head_dim: int  # d
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_id: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, as Hugging Face has them."""
        D, I, d = self.hidden_size, self.intermediate_size, self.head_dim  # noqa: E741 - the recipe's symbols
        queries, keys = self.num_attention_heads * d, self.num_key_value_heads * d
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, D), "model.norm.weight": (D,)}
        if not self.tie_word_embeddings:
            out["lm_head.weight"] = (self.vocab_size, D)
        shapes = [(D,), (queries, D), (keys, D), (keys, D), (D, queries), (D,), (I, D), (I, D), (D, I)]
        for layer in range(self.num_hidden_layers):
            out |= {f"model.layers.{layer}.{n}.weight": s for n, s in zip(LAYER, shapes, strict=True)}
        return out


class LlamaSource(Protocol):
    shape: LlamaShape
    frequencies: Tensor  # angle per position of each rotary pair, float32 [d/2]

    def read(self, name: str) -> Tensor:
        """A tensor by its Hugging Face name; rotary pair j of a head is rows (j, j + d/2)."""
        ...

    def tokenizer(self) -> Tokenizer: ...


def open_llama(path: str | Path) -> LlamaSource:
    """Raises UserError, naming the fault, for another architecture and for what a Llama does not have."""
    path = Path(path)
    if path.suffix == ".gguf":
        return GGUFLlama(path)
    if (path / "config.json").is_file():
        return HFLlama(path)
    raise UserError(f"{path} is neither a Hugging Face directory with config.json nor a .gguf file")


class HFLlama:
    """A directory of safetensors."""

    def __init__(self, directory: Path):
        self.directory = directory
        raw = read_json(directory / "config.json")
        kind = raw.get("model_type")
        if kind == "deepseek_v3":
            raise UserError(f"{directory} is a V3 model already: use `baleen import`")
        if kind not in ("llama", "mistral"):
            reason = REASONS.get(str(kind), "only the Llama family has been shown to convert exactly")
            raise UserError(f"{directory} is a {kind} model: {reason}")
        if raw.get("attention_bias") or raw.get("mlp_bias") or raw.get("sliding_window"):
            raise UserError(f"{directory} has biases or a sliding window, which the converted form cannot express")
        if raw.get("hidden_act", "silu") != "silu" or raw.get("quantization_config"):
            raise UserError(f"{directory} is quantised or has another activation than silu")
        heads = _whole(raw, "num_attention_heads", directory)
        hidden = _whole(raw, "hidden_size", directory)
        eos = raw.get("eos_token_id", 1)
        self.shape = LlamaShape(
            vocab_size=_whole(raw, "vocab_size", directory),
            hidden_size=hidden,
            intermediate_size=_whole(raw, "intermediate_size", directory),
            num_hidden_layers=_whole(raw, "num_hidden_layers", directory),
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            bos_token_id=raw.get("bos_token_id") or 0,
            eos_token_id=(eos[0] if isinstance(eos, list) else eos) or 0,
        )
        self.frequencies = _frequencies(raw, self.shape.head_dim, directory)
        self._files: dict[str, Path] = {}
        for file in weight_files(directory):
            with Shard(file) as shard:
                specs = shard.specs
            for name, spec in specs.items():
                if spec.dtype not in PLAIN_DTYPES:
                    raise UserError(f"{name} in {file} is {spec.dtype}: give the model in float32, bfloat16 or float16")
                self._files[name] = file
        _check(self.shape, {name: Path(file).name for name, file in self._files.items()}, directory)

    def read(self, name: str) -> Tensor:
        with Shard(self._files[name]) as shard:
            tensor = shard.read(name)
        return _of_shape(tensor.float(), name, self.shape, self.directory)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.directory)


class GGUFLlama:
    """A GGUF file of architecture `llama`, whose q and k rows hold the rotary pairs side by side."""

    def __init__(self, path: Path):
        self.file = file = GGUFFile(path)
        kind = file.field("general.architecture", str)
        if kind != "llama":
            reason = REASONS.get(kind, "only the Llama family has been shown to convert exactly")
            raise UserError(f"{path} is a {kind} model: {reason}")
        heads = file.field("llama.attention.head_count", int)
        hidden = file.field("llama.embedding_length", int)
        if heads < 1 or file.field("llama.expert_count", int, 0):
            raise UserError(f"{path} has no heads, or experts: Baleen upcycles dense Llama models")
        tokens = file.field("tokenizer.ggml.tokens", list)
        self.shape = LlamaShape(
            vocab_size=len(tokens),
            hidden_size=hidden,
            intermediate_size=file.field("llama.feed_forward_length", int),
            num_hidden_layers=file.field("llama.block_count", int),
            num_attention_heads=heads,
            num_key_value_heads=file.field("llama.attention.head_count_kv", int, heads),
            head_dim=file.field("llama.attention.key_length", int, hidden // heads),
            max_position_embeddings=file.field("llama.context_length", int),
            rms_norm_eps=file.field("llama.attention.layer_norm_rms_epsilon", float),
            tie_word_embeddings="output.weight" not in file.tensors,
            bos_token_id=file.field("tokenizer.ggml.bos_token_id", int, 0),
            eos_token_id=file.field("tokenizer.ggml.eos_token_id", int, 0),
        )
        if file.field("llama.rope.scaling.type", str, "none") != "none":
            raise UserError(f"{path} has a rope scaling that Baleen does not read from GGUF")
        factors = file.read("rope_freqs.weight") if "rope_freqs.weight" in file.tensors else torch.ones(1)
        theta = file.field("llama.rope.freq_base", float, 10000.0)
        self.frequencies = plain_frequencies(theta, self.shape.head_dim) / factors
        _check(self.shape, {self._hf_name(name): name for name in file.tensors if name != "rope_freqs.weight"}, path)

    def read(self, name: str) -> Tensor:
        tensor = self.file.read(self._gguf_name(name))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = tensor.view(-1, self.shape.head_dim // 2, 2, tensor.shape[-1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return _of_shape(tensor, name, self.shape, self.file.path)

    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_gguf(self.file)

    def _gguf_name(self, name: str) -> str:
        if name in OUTER:
            return OUTER[name]
        _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
        return f"blk.{layer}.{LAYER[inner]}.weight"

    def _hf_name(self, name: str) -> str:
        for ours, theirs in OUTER.items():
            if name == theirs:
                return ours
        blk, _, rest = name.partition(".")
        layer, _, inner = rest.removesuffix(".weight").partition(".")
        known = {theirs: ours for ours, theirs in LAYER.items()}
        return f"model.layers.{layer}.{known[inner]}.weight" if blk == "blk" and inner in known else name


REASONS = {
    "qwen2": "its query bias has no place in the converted form",
    "qwen3": "its norms of queries and keys cannot be expressed in MLA",
    "qwen3_moe": "its norms of queries and keys cannot be expressed in MLA",
    "gemma": "its norms and embedding scale differ from Llama's",
}


def plain_frequencies(theta: float, head_dim: int) -> Tensor:
    """theta^(-2j/d), computed as transformers computes it."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _frequencies(raw: Mapping[str, Any], head_dim: int, where: Path) -> Tensor:
    """With Llama 3's scaling: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    frequencies = plain_frequencies(theta, head_dim)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind != "llama3":
        raise UserError(f"{where} has rope_type {kind!r}: Baleen upcycles default, linear and llama3")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    turns = context * frequencies / (2 * math.pi)  # over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / rope["factor"] + kept * frequencies


def _whole(raw: Mapping[str, Any], key: str, where: Path) -> int:
    if not isinstance(raw.get(key), int) or raw[key] < 1:
        raise UserError(f"{where / 'config.json'} has {key} = {raw.get(key)!r}: Baleen needs a positive whole number")
    return raw[key]


def _check(shape: LlamaShape, held: Mapping[str, str], where: Path) -> None:
    """Raises UserError unless the names are exactly those of the shape, which must be one that makes sense."""
    if min(shape.num_key_value_heads, shape.head_dim, shape.hidden_size, shape.num_hidden_layers) < 1:
        raise UserError(f"{where} has a dimension below 1")
    if shape.num_attention_heads % shape.num_key_value_heads or shape.head_dim % 2:
        raise UserError(
            f"{where} has {shape.num_attention_heads} heads over {shape.num_key_value_heads} key heads of "
            f"{shape.head_dim}: Baleen needs whole groups and an even size"
        )
    if shape.num_hidden_layers > len(held):
        raise UserError(f"{where} announces {shape.num_hidden_layers} layers, more than it has tensors")
    names = shape.tensors().keys()
    for name, place in held.items():
        if name not in names and not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            raise UserError(f"{where} holds {place if place.startswith('blk') else name}, which a Llama does not have")
    if missing := [name for name in names if name not in held]:
        raise UserError(f"{where} lacks {missing[0]}")


def _of_shape(tensor: Tensor, name: str, shape: LlamaShape, where: Path) -> Tensor:
    expected = shape.tensors()[name]
    if tuple(tensor.shape) != expected:
        raise UserError(f"{name} in {where} has shape {list(tensor.shape)}; its settings ask for {list(expected)}")
    if not tensor.isfinite().all():
        raise UserError(f"{name} in {where} holds NaN or infinite values")
    return tensor
