"""The architecture `deepseek2` of GGUF files: which of its tensors and settings stand for which of ours, both ways.

llama.cpp decodes in the absorbed form, so W^UK and W^UV are tensors of their own: attn_k_b [H, R, N], transposed, and
attn_v_b [H, V, R]. Its rotary pairs are interleaved, its experts are stacked, and it knows no MTP layers: those stay
behind. Its norms of the latents take rms_norm_eps where V3's take 1e-6; rows scaled by the root of the ratio make up
for that exactly: RMSNorm(s x, s^2 eps) = RMSNorm(x, eps).

Shapes: H heads, N = qk_nope_head_dim, P = qk_rope_head_dim, V = v_head_dim, R = kv_lora_rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baleen.config import ModelConfig, RopeScaling, UserError
from baleen.interop.names import CORRECTION_BIAS, EMBEDDING, HEAD, Layout
from baleen.model.attention import LATENT_NORM_EPS

ARCHITECTURE = "deepseek2"
SIGMOID = 2  # expert_gating_func
MOST_OF_LLAMA_CPP = 512  # experts, and layers
OUTER = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    CORRECTION_BIAS: "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
KV_B, K_B, V_B = "self_attn.kv_b_proj.weight", "attn_k_b.weight", "attn_v_b.weight"
STACKS = {"gate_proj": "ffn_gate_exps.weight", "up_proj": "ffn_up_exps.weight", "down_proj": "ffn_down_exps.weight"}


class Part(NamedTuple):
    """A tensor of the file, or one expert's slice of it."""

    name: str
    expert: int | None = None


class GGUFLayout:
    """Our tensors (by the names of `Layout`, MTP layers left out) as those of a `deepseek2` file."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self._ours = Layout(config.model_copy(update={"num_nextn_predict_layers": 0}))
        self.names = self._ours.originals()
        self._latent_scale = math.sqrt(config.rms_norm_eps / LATENT_NORM_EPS)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of ours."""
        return self._ours.shape(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file, rows first, as PyTorch counts."""
        out: dict[str, tuple[int, ...]] = {}
        for name in self.names:
            shape = self._ours.shape(name)
            for part in self.parts(name):
                if part.name.endswith((K_B, V_B)):
                    out[part.name] = self._absorbed_shape(part.name)
                else:
                    out[part.name] = shape if part.expert is None else (self.config.n_routed_experts, *shape)
        return out

    def parts(self, name: str) -> list[Part]:
        """Where a tensor of ours goes."""
        if name in OUTER:
            return [Part(OUTER[name])]
        _, _, layer, inner = name.split(".", 3)
        if inner == KV_B:
            return [Part(f"blk.{layer}.{K_B}"), Part(f"blk.{layer}.{V_B}")]
        if inner.startswith("mlp.experts."):
            _, _, expert, projection, _ = inner.split(".")
            return [Part(f"blk.{layer}.{STACKS[projection]}", int(expert))]
        return [Part(f"blk.{layer}.{LAYER[inner]}")]

    def split(self, name: str, tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """A tensor of ours -> those of the file, in the same dtype or, rescaled, in float32."""
        cfg, parts = self.config, self.parts(name)
        if name.endswith(KV_B):
            w_HXR = tensor.unflatten(0, (cfg.num_attention_heads, -1))
            w_uk_HNR, w_uv_HVR = w_HXR.split([cfg.qk_nope_head_dim, cfg.v_head_dim], 1)
            yield from zip(parts, (w_uk_HNR.transpose(1, 2), w_uv_HVR), strict=True)
        else:
            yield parts[0], self._rescaled(name, self._turned(name, tensor, _pairs_together), self._latent_scale)

    def join(self, name: str, read: Callable[[Part], Tensor]) -> Tensor:
        """The inverse; `read` gives a tensor of the file, or the slice of it."""
        tensors = [read(part) for part in self.parts(name)]
        if name.endswith(KV_B):
            return torch.cat((tensors[0].transpose(1, 2), tensors[1]), 1).flatten(0, 1)
        return self._rescaled(name, self._turned(name, tensors[0], _pairs_apart), 1 / self._latent_scale)

    def _absorbed_shape(self, name: str) -> tuple[int, int, int]:
        H, N, V, R = (
            getattr(self.config, key)
            for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
        )
        return (H, R, N) if name.endswith(K_B) else (H, V, R)

    def _turned(self, name: str, tensor: Tensor, order: Callable[[Tensor], Tensor]) -> Tensor:
        """With the rotary rows in the other order, where ours are not interleaved."""
        cfg = self.config
        if cfg.rope_interleave:
            return tensor
        if name.endswith(("q_proj.weight", "q_b_proj.weight")):
            heads = tensor.unflatten(0, (cfg.num_attention_heads, -1))
            nope, rope = heads.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], 1)
            return torch.cat((nope, order(rope)), 1).flatten(0, 1)
        if name.endswith("kv_a_proj_with_mqa.weight"):
            latent, rope = tensor.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim])
            return torch.cat((latent, order(rope[None])[0]))
        return tensor

    def _rescaled(self, name: str, tensor: Tensor, scale: float) -> Tensor:
        if scale == 1.0:
            return tensor
        if name.endswith("q_a_proj.weight"):
            return tensor.float() * scale
        if name.endswith("kv_a_proj_with_mqa.weight"):
            latent, rope = tensor.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim])
            return torch.cat((latent.float() * scale, rope.float()))
        return tensor


def _pairs_together(rows_HPd: Tensor) -> Tensor:
    """Rows (j, j + P/2) -> (2j, 2j + 1)."""
    return rows_HPd.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _pairs_apart(rows_HPd: Tensor) -> Tensor:
    return rows_HPd.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def settings(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a file, without those of the tokenizer. Raises UserError for what llama.cpp cannot compute.

    Some of it would be loaded without a word: YaRN without mscale_all_dim, for one, was tried.
    """
    cfg = config
    if reason := _obstacle(cfg):
        raise UserError(f"llama.cpp cannot compute this model: {reason}")
    own: dict[str, Any] = {
        "block_count": cfg.num_hidden_layers,
        "context_length": cfg.max_position_embeddings,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.intermediate_size,
        "vocab_size": cfg.vocab_size,
        "attention.head_count": cfg.num_attention_heads,
        "attention.head_count_kv": 1,  # absorbed: the latent is one key for all heads
        "attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
        "attention.q_lora_rank": cfg.q_lora_rank or 0,
        "attention.kv_lora_rank": cfg.kv_lora_rank,
        "attention.key_length": cfg.latent_dim,
        "attention.value_length": cfg.kv_lora_rank,
        "attention.key_length_mla": cfg.qk_head_dim,
        "attention.value_length_mla": cfg.v_head_dim,
        "rope.dimension_count": cfg.qk_rope_head_dim,
        "rope.freq_base": cfg.rope_theta,
        "leading_dense_block_count": min(cfg.first_k_dense_replace, cfg.num_hidden_layers),
        "expert_count": cfg.n_routed_experts,
        "expert_used_count": cfg.num_experts_per_tok,
        "expert_shared_count": cfg.n_shared_experts,
        "expert_feed_forward_length": cfg.moe_intermediate_size,
        "expert_weights_scale": cfg.routed_scaling_factor,
        "expert_weights_norm": cfg.norm_topk_prob,
        "expert_gating_func": SIGMOID,
    }
    if cfg.n_routed_experts > 1:  # it wants fewer groups than experts, and of several not all
        limited = cfg.topk_group < cfg.n_group
        own |= {
            "expert_group_count": cfg.n_group if limited else 1,
            "expert_group_used_count": cfg.topk_group if limited else 1,
        }
    if isinstance(cfg.rope_scaling, RopeScaling):
        own |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": cfg.rope_scaling.factor,
            "rope.scaling.original_context_length": cfg.rope_scaling.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": cfg.rope_scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": cfg.rope_scaling.beta_slow,
            "rope.scaling.yarn_log_multiplier": 0.1 * (cfg.rope_scaling.mscale_all_dim or 0.0),
        }
    return {f"{ARCHITECTURE}.{key}": value for key, value in own.items()}


def _obstacle(cfg: ModelConfig) -> str:
    """What llama.cpp would refuse or, worse, get wrong; empty if nothing."""
    scaling = cfg.rope_scaling
    if cfg.attention_bias:
        return "it has no biases in attention (attention_bias), and would leave them out"
    if scaling is not None and not isinstance(scaling, RopeScaling):
        return "it does not read frequencies of one's own (longrope) for this architecture, and would take plain ones"
    if scaling is not None and not (scaling.mscale and scaling.mscale == scaling.mscale_all_dim):
        return "it scales by YaRN only as V3 does, with mscale and mscale_all_dim equal and not 0"
    if cfg.n_shared_experts == 0 and cfg.first_k_dense_replace < cfg.num_hidden_layers:
        return "it wants shared experts in every MoE layer (n_shared_experts is 0)"
    if cfg.num_hidden_layers in (26, 27) and cfg.q_lora_rank is not None:
        return "it takes any model of 26 or 27 layers for V2 Lite, which has no q_lora_rank"
    for name, value in (("n_routed_experts", cfg.n_routed_experts), ("num_hidden_layers", cfg.num_hidden_layers)):
        if value > MOST_OF_LLAMA_CPP:
            return f"it holds at most {MOST_OF_LLAMA_CPP} ({name} is {value})"
    return ""
