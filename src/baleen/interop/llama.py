"""Llama-family checkpoints, from a Hugging Face directory or a GGUF file: what upcycling starts from."""

from __future__ import annotations

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
from baleen.interop.llama_config import generation_settings, llama_config
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
FACTORS = "rope_freqs.weight"  # of a GGUF file: what divides the frequency of each rotary pair


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
    generation: Mapping[str, Any]  # for generation_config.json: every end token, and sampling if the source has it

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
        where = str(directory / "config.json")
        config = llama_config(raw, where)
        heads = config.num_attention_heads
        self.shape = LlamaShape(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=config.num_key_value_heads or heads,
            head_dim=config.head_dim or config.hidden_size // heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id[0],
        )
        self.generation: Mapping[str, Any] = generation_settings(directory, config)
        rope = config.rope(where)
        self._files: dict[str, Path] = {}
        held: dict[str, tuple[int, ...]] = {}
        for file in weight_files(directory):
            with Shard(file) as shard:
                specs = shard.specs
            for name, spec in specs.items():
                if name in self._files:
                    raise UserError(f"{file} repeats {name}, which {self._files[name].name} holds")
                if spec.dtype not in PLAIN_DTYPES:
                    raise UserError(f"{name} in {file} is {spec.dtype}: give the model in float32, bfloat16 or float16")
                self._files[name] = file
                held[name] = spec.shape
        _check(self.shape, held, directory)
        plain = plain_frequencies(rope.rope_theta, self.shape.head_dim)
        self.frequencies = _positive(rope.scaled(plain), directory)

    def read(self, name: str) -> Tensor:
        with Shard(self._files[name]) as shard:
            tensor = shard.read(name)
        if not tensor.isfinite().all():
            raise UserError(f"{name} in {self._files[name]} holds NaN or infinite values")
        return tensor.float()

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
        eos, eot = self.shape.eos_token_id, file.field("tokenizer.ggml.eot_token_id", int, self.shape.eos_token_id)
        self.generation: Mapping[str, Any] = {"eos_token_id": [eos, eot] if eot != eos else eos}
        if file.field("llama.rope.scaling.type", str, "none") != "none":
            raise UserError(f"{path} has a rope scaling that Baleen does not read from GGUF")
        if file.field("llama.rope.dimension_count", int, self.shape.head_dim) != self.shape.head_dim:
            raise UserError(f"{path} turns only part of each head (rope.dimension_count): Baleen upcycles whole ones")
        held = {self._hf_name(name): info.shape for name, info in file.tensors.items() if name != FACTORS}
        _check(self.shape, held, path)
        frequencies = plain_frequencies(file.field("llama.rope.freq_base", float, 10000.0), self.shape.head_dim)
        if FACTORS in file.tensors:
            if file.tensors[FACTORS].shape != frequencies.shape:
                raise UserError(f"{FACTORS} in {path} has another shape than the {len(frequencies)} rotary pairs")
            frequencies /= file.read(FACTORS)
        self.frequencies = _positive(frequencies, path)

    def read(self, name: str) -> Tensor:
        tensor = self.file.read(self._gguf_name(name))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = tensor.view(-1, self.shape.head_dim // 2, 2, tensor.shape[-1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor

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


def _positive(frequencies: Tensor, where: Path) -> Tensor:
    if not (frequencies.isfinite() & (frequencies > 0)).all():
        raise UserError(f"{where} has rope settings whose frequencies are not positive numbers")
    return frequencies


def _check(shape: LlamaShape, held: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raises UserError unless names and shapes are exactly those asked for, which must make sense."""
    if min(shape.num_key_value_heads, shape.head_dim, shape.hidden_size, shape.num_hidden_layers) < 1:
        raise UserError(f"{where} has a dimension below 1")
    if shape.num_attention_heads % shape.num_key_value_heads or shape.head_dim % 2:
        raise UserError(
            f"{where} has {shape.num_attention_heads} heads over {shape.num_key_value_heads} key heads of "
            f"{shape.head_dim}: Baleen needs whole groups and an even size"
        )
    if shape.num_hidden_layers > len(held):
        raise UserError(f"{where} announces {shape.num_hidden_layers} layers, more than it has tensors")
    expected = shape.tensors()
    for name, found in held.items():
        if name not in expected and not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            raise UserError(f"{where} holds {name}, which a Llama does not have")
        if found != expected.get(name, found):
            asked = f"its settings ask for {list(expected[name])}"
            raise UserError(f"{name} in {where} has shape {list(found)}; {asked}")
    if missing := [name for name in expected if name not in held]:
        raise UserError(f"{where} lacks {missing[0]}")
