"""Multi-head latent attention (arXiv 2412.19437 §2.1.1, Eq. 1-11), naive and absorbed.

Shapes: B batch, T query tokens, S key tokens, d hidden, H heads, N = qk_nope_head_dim, P = qk_rope_head_dim,
V = v_head_dim, R = kv_lora_rank, C = R + P (what the cache holds).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from baleen.config import ModelConfig
from baleen.model.cache import CacheView
from baleen.model.fused import rms_norm
from baleen.model.linear import Linear
from baleen.model.rope import Rotation, softmax_scale
from baleen.model.sdpa import Attention

# Released code builds the norms of the latents with this epsilon, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class Context(NamedTuple):
    """What every layer of one forward shares: where the tokens stand and what they may see."""

    cos: Tensor  # [B, T, P/2]
    sin: Tensor
    mask: Tensor | None  # [B, 1, T, T] bool, True where a query sees a key; None: plainly causal
    cache: CacheView | None  # then B is 1, T counts the tokens of all sequences, and who sees what the cache knows


def document_mask(document_ids_BT: Tensor | None) -> Tensor | None:
    """A Context's mask by which tokens see those before them in their own document; None without documents."""
    if document_ids_BT is None:
        return None
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    return same_BTT.tril()[:, None]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype that the matmuls behind it compute in: under autocast each of them would cast again."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return rms_norm(x, self.weight, self.eps, dtype)


class LatentAttention(nn.Module):
    """MLA. The cache stores c^KV and k^R only; keys and values are c^KV times W^UK and W^UV (both in kv_b_proj).

    *Naive*: expand keys and values of every head, then attend as usual: for training and prefill.
    *Absorbed*: fold W^UK into the query and W^UV into the output, so that all heads attend to the latent itself as
    one shared key and value: for decoding. Both compute the same function.
    """

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.scale = softmax_scale(config)
        d, H, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(d, H * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(d, config.q_lora_rank, bias=bias)  # W^DQ
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, H * config.qk_head_dim, bias=False)  # W^UQ, W^QR
        self.kv_a_proj_with_mqa = Linear(d, config.latent_dim, bias=bias)  # W^DKV, W^KR
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )  # W^UK, W^UV
        self.o_proj = Linear(H * config.v_head_dim, d, bias=bias)  # W^O
        self.rotate = Rotation(config.rope_interleave)
        self.attend = Attention(self.scale)

    def forward(self, x_BTd: Tensor, context: Context) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        q_nope_BTHN, q_rope_BTHP = self._queries(x_BTd, context)
        latents_BTC = self._latents(x_BTd, context)
        if context.cache is None:
            out_BTHV = self._naive(q_nope_BTHN, q_rope_BTHP, latents_BTC, context.mask)
        else:
            out_BTHV = self._cached(q_nope_BTHN[0], q_rope_BTHP[0], latents_BTC[0], context.cache)[None]
        return self.o_proj(out_BTHV.flatten(2))

    def _cached(self, q_nope_NHX: Tensor, q_rope_NHP: Tensor, latents_NC: Tensor, cache: CacheView) -> Tensor:
        """Keep the new latents, then let every sequence attend to its own; returns [N, H, V]."""
        cache.write(self.layer_idx, latents_NC)
        outs = []
        for segment in cache.segments:
            latents_BSC = cache.read(self.layer_idx, segment).to(latents_NC.dtype)
            q_nope = q_nope_NHX[segment.tokens].unflatten(0, segment.shape)
            q_rope = q_rope_NHP[segment.tokens].unflatten(0, segment.shape)
            if self.prefers_absorbed(segment.shape[1], segment.visible):
                out = self._absorbed(q_nope, q_rope, latents_BSC, None if segment.sees_all else segment.mask_B1TS)
            else:
                out = self._naive(q_nope, q_rope, latents_BSC, None if segment.is_causal else segment.mask_B1TS)
            outs.append(out.flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _queries(self, x_BTd: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Eq. 6-9: q^C and the rotated q^R."""
        cfg = self.config
        q = self.q_proj(x_BTd) if cfg.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTd)))
        q_nope, q_rope = q.unflatten(-1, (-1, cfg.qk_head_dim)).split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        return q_nope, self.rotate(q_rope, context.cos[:, :, None], context.sin[:, :, None])

    def _latents(self, x_BTd: Tensor, context: Context) -> Tensor:
        """Eq. 1 and 3: [c^KV after its norm ; k^R rotated], [B, T, C]."""
        cfg = self.config
        c_kv, k_rope = self.kv_a_proj_with_mqa(x_BTd).split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        k_rope = self.rotate(k_rope, context.cos, context.sin)
        return torch.cat((self.kv_a_layernorm(c_kv), k_rope), -1)

    def _naive(self, q_nope: Tensor, q_rope: Tensor, latents_BSC: Tensor, mask: Tensor | None) -> Tensor:
        """Eq. 2, 4, 5, 10 with k and v of every head in full; returns [B, T, H, V]."""
        cfg = self.config
        c_kv, k_rope = latents_BSC.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        kv_BSHX = self.kv_b_proj(c_kv).unflatten(-1, (cfg.num_attention_heads, -1))
        return self.attend(q_nope, q_rope, kv_BSHX, k_rope, mask)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latents_BSC: Tensor, mask: Tensor | None) -> Tensor:
        """The same over the latents as one shared key and value head, all of them without a mask; [B, T, H, V]."""
        cfg = self.config
        w_HXR = self.kv_b_proj.weight.unflatten(0, (cfg.num_attention_heads, -1))
        w_uk_HNR, w_uv_HVR = w_HXR.split([cfg.qk_nope_head_dim, cfg.v_head_dim], 1)
        query_BTHC = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, w_uk_HNR), q_rope), -1)
        B, T, H, C = query_BTHC.shape
        scores = (query_BTHC.reshape(B, T * H, C) @ latents_BSC.transpose(1, 2)).view(B, T, H, -1) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask.transpose(1, 2), float("-inf"))
        probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        out_BTHR = (probs.view(B, T * H, -1) @ latents_BSC[..., : cfg.kv_lora_rank]).view(B, T, H, -1)
        return torch.einsum("bthr,hvr->bthv", out_BTHR, w_uv_HVR)

    def prefers_absorbed(self, T: int, S: int) -> bool:
        """Whether the absorbed form takes fewer multiplications for T queries over S cached tokens."""
        cfg = self.config
        up = cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
        naive = S * up + T * S * (cfg.qk_head_dim + cfg.v_head_dim)
        absorbed = T * up + T * S * (cfg.latent_dim + cfg.kv_lora_rank)
        return absorbed < naive
