"""FP8 in blocks (arXiv 2412.19437 §3.3): E4M3 numbers, one scale a block, as released weights and tiles have it.

Shapes: X [..., R, C] in blocks of (r, c); its scales are [..., ceil(R/r), ceil(C/c)]; the last blocks may be partial.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
WEIGHT_BLOCK = (128, 128)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a tensor of this shape."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def quantize_blocks(x: Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x -> (E4M3 of the same shape, float32 scales): a block's largest magnitude becomes 448.

    block: (128, 128) for weights, (1, 128) for activations, (128, 1) for their gradients. power_of_two: scales are
    rounded up to a power of 2, which UE8M0 holds exactly. A block of zeros has scale 1.
    """
    blocks = _in_blocks(x.float(), block)
    largest = blocks.abs().amax((-3, -1), keepdim=True)
    least = (largest / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)  # a quotient may be too small to divide by
    scale = torch.where(largest == 0, torch.ones_like(largest), least)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where(scale.isfinite(), rounded, scale)  # what is not finite stays so, for the trainer to see
    quantized = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return _out_of_blocks(quantized, x.shape), scale.squeeze(-1).squeeze(-2)


def dequantize_blocks(quantized: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """E4M3 and its scales (float32 or UE8M0, `weight_scale_inv` on disk) -> float32."""
    blocks = _in_blocks(quantized.float(), block)
    blocks *= scale.float()[..., :, None, :, None]
    return _out_of_blocks(blocks, quantized.shape)


def _in_blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., R, C] -> [..., R/r, r, C/c, c], padded with zeros."""
    (r, c), (R, C) = block, x.shape[-2:]
    if R % r or C % c:
        x = F.pad(x, (0, -C % c, 0, -R % r))
    return x.unflatten(-1, (-(-C // c), c)).unflatten(-3, (-(-R // r), r))  # counted, for x may have no rows


def _out_of_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()
