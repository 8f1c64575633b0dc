"""A `deepseek2` GGUF file as a checkpoint: the same face as a Hugging Face directory's, in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from baleen.config import ModelConfig, UserError
from baleen.data.tokenizer import Tokenizer
from baleen.interop.deepseek2 import ARCHITECTURE, SIGMOID, GGUFLayout
from baleen.interop.gguf_file import GGUFFile
from baleen.interop.gguf_tokenizer import tokenizer_from_gguf
from baleen.interop.names import weights_in
from baleen.interop.shards import Spec

V3_TRUNK = 61, 256  # layers and experts of V3 and R1


class GGUFCheckpoint:
    """`config` and tensors of a file whose names, shapes and settings agree. Opening it reads the header only.

    Raises UserError, naming the file or the tensor, for a damaged file, a missing, unknown or misshapen tensor, another
    architecture, gates that are not sigmoids, V3 without its expert groups, or MTP layers, which Baleen does not read
    from GGUF.
    """

    dtype = torch.float32

    def __init__(self, path: str | Path):
        self.file = GGUFFile(path)
        kind = self.file.field("general.architecture", str)
        if kind == "llama":
            raise UserError(f"{path} is a {kind} model: `baleen upcycle {path} OUT` makes a V3 model of it")
        if kind != ARCHITECTURE:
            raise UserError(f"{path} is a {kind!r} model: Baleen reads {ARCHITECTURE}, and upcycles llama")
        self.config = _config(self.file)
        self._check_size()
        self.layout = GGUFLayout(self.config)
        self._check_tensors()

    def specs(self) -> dict[str, Spec]:
        """What `tensors` will yield, by name."""
        return {name: Spec(self.dtype, self.layout.shape(name)) for name in self.layout.names}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, dequantised. Raises UserError for a value that is not finite."""
        for name in self.layout.names:
            yield name, self.layout.join(name, lambda part: self.file.read(part.name, part.expert))

    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_gguf(self.file)

    def _check_size(self) -> None:
        """Settings that lie must not make us count to a billion."""
        cfg = self.config
        held = sum(math.prod(info.shape) for info in self.file.tensors.values())
        if cfg.num_hidden_layers > len(self.file.tensors) or weights_in(cfg) > 2 * held:  # less is told by name
            raise UserError(f"{self.file.path} announces more layers or weights than it holds")

    def _check_tensors(self) -> None:
        shapes, found = self.layout.shapes(), self.file.tensors
        for name, info in found.items():
            if name not in shapes:
                raise UserError(f"{self.file.path} holds {name}, which a model of its settings does not have")
            if info.shape != shapes[name]:
                asked = f"its settings ask for {list(shapes[name])}"
                raise UserError(f"{name} in {self.file.path} has shape {list(info.shape)}; {asked}")
        if missing := [name for name in shapes if name not in found]:
            raise UserError(f"{self.file.path} lacks {missing[0]}")


def _config(file: GGUFFile) -> ModelConfig:
    def get(key: str, kind: type = int, default: Any = None) -> Any:
        return file.field(f"{ARCHITECTURE}.{key}", kind, default)

    if get("expert_gating_func", int, 0) != SIGMOID:
        raise UserError(f"{file.path} gates its experts by softmax, as V2 did; Baleen builds V3's sigmoid")
    if get("nextn_predict_layers", int, 0):
        raise UserError(f"{file.path} has MTP layers, which Baleen does not read from GGUF: take the safetensors")
    if (get("block_count"), get("expert_count")) == V3_TRUNK and get("expert_group_count", int, 0) == 0:
        raise UserError(
            f"{file.path} does not say expert_group_count, as files of before late 2025, and without its 8 groups "
            "V3 computes something else: convert the safetensors again with a newer llama.cpp"
        )
    rope = get("rope.dimension_count")
    try:
        return ModelConfig.model_validate(
            dict(
                vocab_size=get("vocab_size", int, len(file.field("tokenizer.ggml.tokens", list))),
                hidden_size=get("embedding_length"),
                intermediate_size=get("feed_forward_length"),
                moe_intermediate_size=get("expert_feed_forward_length"),
                num_hidden_layers=get("block_count"),
                num_attention_heads=get("attention.head_count"),
                q_lora_rank=get("attention.q_lora_rank", int, 0),
                kv_lora_rank=get("attention.kv_lora_rank"),
                qk_nope_head_dim=get("attention.key_length_mla") - rope,
                qk_rope_head_dim=rope,
                v_head_dim=get("attention.value_length_mla"),
                n_routed_experts=get("expert_count"),
                n_shared_experts=get("expert_shared_count"),
                num_experts_per_tok=get("expert_used_count"),
                n_group=get("expert_group_count", int, 1) or 1,
                topk_group=get("expert_group_used_count", int, 1) or 1,
                first_k_dense_replace=get("leading_dense_block_count", int, 0),
                routed_scaling_factor=get("expert_weights_scale", float, 1.0),
                norm_topk_prob=get("expert_weights_norm", bool, False),
                num_nextn_predict_layers=0,
                max_position_embeddings=get("context_length"),
                rope_theta=get("rope.freq_base", float, 10000.0),
                rope_scaling=_rope_scaling(file),
                rms_norm_eps=get("attention.layer_norm_rms_epsilon", float),
                tie_word_embeddings="output.weight" not in file.tensors,
                bos_token_id=file.field("tokenizer.ggml.bos_token_id", int, 0),
                eos_token_id=file.field("tokenizer.ggml.eos_token_id", int, 0),
            )
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file.path} describes no model: {key}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    key = f"{ARCHITECTURE}.rope.scaling."
    match file.field(key + "type", str, "none"):
        case "none":
            return None
        case "yarn":
            mscale = round(10 * file.field(key + "yarn_log_multiplier", float, 0.0), 6)
            if not mscale:
                raise UserError(f"{file.path} uses YaRN without yarn_log_multiplier, in a form that only llama.cpp has")
            return {
                "factor": file.field(key + "factor", float),
                "original_max_position_embeddings": file.field(key + "original_context_length", int),
                "beta_fast": file.field(key + "yarn_beta_fast", float, 32.0),
                "beta_slow": file.field(key + "yarn_beta_slow", float, 1.0),
                "mscale": mscale,
                "mscale_all_dim": mscale,
            }
        case other:
            raise UserError(f"{file.path} scales its rope as {other!r}, which Baleen does not read from GGUF")
