"""Rotary position embedding of the decoupled key (arXiv 2412.19437 Eq. 3 and 8), with YaRN (arXiv 2309.00071).

Shapes: B batch, T tokens, P = qk_rope_head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from baleen.config import LongRope, ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotary pair, float32 [P/2]; interpolated by YaRN or divided pair by pair on demand."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    wavelength = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    yarn = config.rope_scaling
    if isinstance(yarn, LongRope):
        return 1.0 / (torch.tensor(yarn.short_factor, dtype=torch.float32) * wavelength)
    inv_freq = 1.0 / wavelength
    if yarn is None:
        return inv_freq

    def pair_that_turns(rotations: float) -> float:
        """Index of the pair that makes `rotations` turns over the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (max(high - low, 0.001))
    interpolated = ramp.clamp(0, 1)
    return inv_freq / yarn.factor * interpolated + inv_freq * (1 - interpolated)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's sqrt(t) = 0.1 * mscale * ln(factor) + 1: 1.36889 for V3's factor of 40."""
    return 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(d_h + d_h^R), times sqrt(t)^2 if `mscale_all_dim` is set."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if isinstance(yarn, RopeScaling) and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _rotation_scale(yarn: RopeScaling | LongRope | None) -> float:
    """Factor on cos and sin: 1 in V3's spelling (mscale = mscale_all_dim), else YaRN's own sqrt(t)."""
    if not isinstance(yarn, RopeScaling):
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


class RotaryEmbedding(nn.Module):
    """Positions [B, T] -> (cos, sin), each [B, T, P/2]. Angles are float32 whatever the model's dtype."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.scale = _rotation_scale(config.rope_scaling)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def _apply(self, fn, recurse=True):
        angles = self.inv_freq
        super()._apply(fn, recurse)
        if not (angles.is_meta or self.inv_freq.is_meta):  # the model may be cast, its angles may not
            self.inv_freq = angles.to(self.inv_freq.device)
        return self

    def reset_parameters(self) -> None:
        self.inv_freq = inverse_frequencies(self.config).to(self.inv_freq.device)

    def forward(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles_BTP = positions_BT[..., None].float() * self.inv_freq
        return (angles_BTP.cos() * self.scale).to(dtype), (angles_BTP.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Turn the rotary pairs of x [..., P] by angles that broadcast to [..., P/2].

    The released weights interleave the pairs (0, 1), (2, 3), ...; otherwise pair j is (j, j + P/2). The result holds
    all first members, then all second ones: queries and keys are permuted alike, so scores do not change.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if interleave else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Rotation(nn.Module):
    """`rotate`, as a module: what is applied to a model from outside finds it."""

    def __init__(self, interleave: bool):
        super().__init__()
        self.interleave = interleave

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos, sin, self.interleave)
