"""The attention that MLA is compared with: MHA, GQA and MQA, differing in their number of key and value heads.

Shapes: B batch, T tokens, d hidden, H heads, G key and value heads, D = v_head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baleen.config import ModelConfig, UserError
from baleen.model.attention import Context
from baleen.model.linear import Linear
from baleen.model.rope import rotate
from baleen.model.transformer import Transformer


class SharedHeadAttention(nn.Module):
    """As Llama's: G = H is MHA, G = 1 MQA. Rotary in all of a head; for training only, there is no cache."""

    def __init__(self, config: ModelConfig, key_value_heads: int):
        super().__init__()
        if config.qk_rope_head_dim != config.v_head_dim or config.num_attention_heads % key_value_heads:
            raise UserError("plain attention needs qk_rope_head_dim = v_head_dim, and heads that divide into groups")
        d, D = config.hidden_size, config.v_head_dim
        self.head_dim, self.interleave = D, config.rope_interleave
        self.q_proj = Linear(d, config.num_attention_heads * D, bias=False)
        self.k_proj = Linear(d, key_value_heads * D, bias=False)
        self.v_proj = Linear(d, key_value_heads * D, bias=False)
        self.o_proj = Linear(config.num_attention_heads * D, d, bias=False)

    def forward(self, x_BTd: Tensor, context: Context) -> Tensor:
        assert context.cache is None and context.mask is None
        q_BTHD, k_BTGD, v_BTGD = (
            proj(x_BTd).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = context.cos[:, :, None], context.sin[:, :, None]
        q_BTHD, k_BTGD = rotate(q_BTHD, cos, sin, self.interleave), rotate(k_BTGD, cos, sin, self.interleave)
        with torch.autocast(x_BTd.device.type, enabled=False):
            q, k, v = (heads.transpose(1, 2).float() for heads in (q_BTHD, k_BTGD, v_BTGD))
            out_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2).to(v_BTGD.dtype))


def use_shared_heads(model: Transformer, key_value_heads: int) -> None:
    """Replace MLA in every layer, in place; the weights are to be initialised after it."""
    for layer in model.trunk_layers:
        layer.self_attn = SharedHeadAttention(model.config, key_value_heads).to(model.device)  # type: ignore[assignment]


def cached_numbers(config: ModelConfig, key_value_heads: int | None) -> int:
    """Per token and layer: MLA's latent, or keys and values."""
    return config.latent_dim if key_value_heads is None else 2 * key_value_heads * config.v_head_dim
