"""Training in FP8 (arXiv 2412.19437 §3.3): the three matmuls of every linear layer in E4M3, the rest left as it is.

What is quantised, of y = x Wᵀ with gradient g of y; every scale is computed online, from the block it serves:

    forward        x in tiles of 1 x 128, W in blocks of 128 x 128
    gradient of x  g in tiles of 1 x 128, W as in the forward
    gradient of W  g and x in tiles of 128 x 1; x is quantised again from the FP8 copy that the forward kept

Sums run over 128 products at a time; these partial sums are scaled and added up in FP32. Embedding, output head,
gates, norms, attention between its projections, and MTP's eh_proj (as in the released weights) stay wide.

GPUs whose tensor cores know a scale for every tile multiply in FP8 (`F.scaled_mm`; untried, for want of one). Elsewhere
the same numbers are multiplied in FP32: what training in FP8 does to a loss can be seen, what it saves in time can't,
and within 128 products sums are FP32's, where an H800 keeps 14 bits. Two things differ from the paper. The inputs of
SwiGLU are kept wide, not in FP8. And it doesn't say what tensor cores, which know no E5M6, multiply after attention:
here E4M3 tiles are made of the E5M6 copy.

Shapes: M rows, I inputs, O outputs, E experts, Kb = ceil(K / 128) blocks along what a product sums over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baleen.model.attention import LatentAttention
from baleen.model.fp8 import WEIGHT_BLOCK, dequantize_blocks, quantize_blocks
from baleen.model.linear import Linear
from baleen.model.machine import multiplies_fp8_tiles
from baleen.model.moe import Experts
from baleen.model.transformer import Transformer

ROW_TILE, COLUMN_TILE = (1, 128), (128, 1)
PROMOTED = 128  # products between two additions in FP32: N_C of §3.3.2
E5M6_MAX = 65024.0  # (2 - 2^-6) * 2^15
E5M6_MANTISSA, E5M6_MIN_EXPONENT = 6, -14


class Formats(NamedTuple):
    """How one layer departs from plain tiles."""

    input_e5m6: bool = False  # x is kept for the backward in E5M6; all its scales are powers of two
    input_power_of_two: bool = False  # scales of x
    gradient_power_of_two: bool = False  # scales of g


PLAIN = Formats()
AFTER_ATTENTION = Formats(input_e5m6=True, input_power_of_two=True)
# Rows that travel between ranks on their way to the layer, or back from it (§3.3.3, "Low-Precision Communication").
EXPERT_UP, EXPERT_DOWN = Formats(input_power_of_two=True), Formats(gradient_power_of_two=True)


def use_fp8(model: Transformer) -> None:
    """Let the linear layers and experts of a whole model train in FP8, in place: names and weights are as before.

    Without gradients they compute as before, so that what is measured on the way is the model that is saved.
    """
    for module, formats in _quantised(model):
        if isinstance(module, Experts):
            module.__class__ = FP8Experts
        else:
            module.__class__ = FP8Linear
            module.formats = formats  # type: ignore[assignment]


def _quantised(model: Transformer) -> Iterator[tuple[nn.Linear | Experts, Formats]]:
    after_attention = {module.o_proj for module in model.modules() if isinstance(module, LatentAttention)}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield module, PLAIN
        elif isinstance(module, nn.Linear) and not name.endswith(("lm_head", "eh_proj")):
            yield module, AFTER_ATTENTION if module in after_attention else PLAIN


class FP8Linear(Linear):
    formats: Formats

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(input)
        rows = input.flatten(0, -2)
        y = fp8_grouped_linear(rows, self.weight[None], [len(rows)], self.formats).unflatten(0, input.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FP8Experts(Experts):
    def forward(self, x_Md: Tensor, counts: list[int] | Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x_Md, counts)
        groups = counts.tolist() if isinstance(counts, Tensor) else counts
        hidden = self.act_fn(fp8_grouped_linear(x_Md, self.gate_up_proj, groups, EXPERT_UP))
        return fp8_grouped_linear(hidden, self.down_proj, groups, EXPERT_DOWN)


def fp8_grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts: list[int], formats: Formats = PLAIN) -> Tensor:
    """Rows of group e times weight[e]ᵀ, [M, O], all three matmuls in FP8: the twin of `grouped_linear`.

    The result is in autocast's dtype where that is on, else in that of x.
    """
    out: Tensor = _FP8GroupedLinear.apply(x_MI, weight_EOI, counts, formats)  # type: ignore[assignment]
    device = x_MI.device.type
    return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


class _FP8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MI: Tensor, weight_EOI: Tensor, counts: list[int], formats: Formats) -> Tensor:
        w, w_scale = quantize_blocks(weight_EOI, WEIGHT_BLOCK)
        kept = to_e5m6(x_MI) if formats.input_e5m6 else None
        x, x_scale = quantize_blocks(x_MI if kept is None else kept, ROW_TILE, power_of_two=formats.input_power_of_two)
        ctx.save_for_backward(w, w_scale, *((x, x_scale) if kept is None else (kept,)))
        ctx.counts, ctx.formats, ctx.dtypes = counts, formats, (x_MI.dtype, weight_EOI.dtype)
        scale_EOK = w_scale.repeat_interleave(WEIGHT_BLOCK[0], 1)[:, : w.shape[1]]
        groups = zip(x.split(counts), x_scale.split(counts), w, scale_EOK, strict=True)
        return torch.cat([promoted_matmul(*group) for group in groups]).to(x_MI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MO: Tensor):  # type: ignore[override]
        w, w_scale, *saved = ctx.saved_tensors
        counts, formats = ctx.counts, ctx.formats
        x_MI = saved[0].float() if formats.input_e5m6 else dequantize_blocks(saved[0], saved[1], ROW_TILE)
        grad_x, grad_w = torch.empty_like(x_MI), torch.empty(w.shape, device=w.device)
        g, g_scale = quantize_blocks(grad_MO, ROW_TILE, power_of_two=formats.gradient_power_of_two)
        scale_EIK = w_scale.transpose(1, 2).repeat_interleave(WEIGHT_BLOCK[1], 1)[:, : w.shape[2]]
        start = 0
        for e, count in enumerate(counts):
            rows = slice(start, start := start + count)
            grad_x[rows] = promoted_matmul(g[rows], g_scale[rows], w[e].t(), scale_EIK[e])
            g_columns, g_columns_scale = quantize_blocks(
                grad_MO[rows], COLUMN_TILE, power_of_two=formats.gradient_power_of_two
            )
            x_columns, x_columns_scale = quantize_blocks(
                x_MI[rows], COLUMN_TILE, power_of_two=formats.input_power_of_two
            )
            grad_w[e] = promoted_matmul(g_columns.t(), g_columns_scale.t(), x_columns.t(), x_columns_scale.t())
        x_dtype, w_dtype = ctx.dtypes
        return grad_x.to(x_dtype), grad_w.to(w_dtype), None, None


def promoted_matmul(a_MK: Tensor, a_scale_MKb: Tensor, b_NK: Tensor, b_scale_NKb: Tensor) -> Tensor:
    """A Bᵀ of FP8 numbers with a scale for every 128 of a row: [M, K] x [N, K] -> FP32 [M, N]."""
    if multiplies_fp8_tiles(a_MK.device):
        return scaled_matmul(a_MK, a_scale_MKb, b_NK, b_scale_NKb)
    out_MN = torch.zeros(a_MK.shape[0], b_NK.shape[0], device=a_MK.device)
    with torch.autocast(a_MK.device.type, enabled=False):
        for block in range(a_scale_MKb.shape[1]):
            summed = slice(block * PROMOTED, (block + 1) * PROMOTED)
            partial = a_MK[:, summed].float() @ b_NK[:, summed].float().t()
            out_MN += partial * a_scale_MKb[:, block, None] * b_scale_NKb[:, block]
    return out_MN


def scaled_matmul(a_MK: Tensor, a_scale_MKb: Tensor, b_NK: Tensor, b_scale_NKb: Tensor) -> Tensor:
    """`promoted_matmul` by tensor cores, which promote by themselves as long as fast accumulation is off. Zeros fill
    the sizes up to those that they take."""
    if not (a_MK.numel() and b_NK.numel()):
        return torch.zeros(len(a_MK), len(b_NK), device=a_MK.device)
    (a, a_scale), (b, b_scale) = _filled_up(a_MK, a_scale_MKb), _filled_up(b_NK, b_scale_NKb)
    tiles = F.ScalingType.BlockWise1x128
    out = F.scaled_mm(a, b.t(), a_scale, tiles, b_scale, tiles, output_dtype=torch.float32, use_fast_accum=False)
    return out.narrow(0, 0, len(a_MK)).narrow(1, 0, len(b_NK))


def _filled_up(x_MK: Tensor, scale_MKb: Tensor) -> tuple[Tensor, Tensor]:
    """M to a multiple of 16 and K to one of 128; the scales lie column by column."""
    M, K = x_MK.shape
    rows, columns = -M % 16, -K % PROMOTED
    x = F.pad(x_MK.contiguous().view(torch.uint8), (0, columns, 0, rows)).view(x_MK.dtype)
    scale_KbM = F.pad(scale_MKb.t(), (0, rows)).clone(memory_format=torch.contiguous_format)
    return x, scale_KbM.t()


def to_e5m6(x_MI: Tensor) -> Tensor:
    """x rounded to E5M6 in tiles of 1 x 128 whose scales are powers of two, as bfloat16.

    Six bits of mantissa under a power of two are seven of bfloat16's eight: it holds number times scale exactly.
    """
    width = x_MI.shape[1]
    tiles = F.pad(x_MI.float(), (0, -width % ROW_TILE[1])).unflatten(1, (-1, ROW_TILE[1]))
    # A tile of zeros, or of numbers too small for a scale of their own, is divided by the smallest normal number.
    least = tiles.abs().amax(-1, keepdim=True) / E5M6_MAX
    mantissa, exponent = torch.frexp(least.clamp(min=torch.finfo(torch.float32).tiny))
    scale = torch.ldexp(torch.ones_like(least), exponent - (mantissa == 0.5).int())
    scale = torch.where(least.isfinite(), scale, least)  # what is not finite stays so, for the trainer to see
    numbers = tiles / scale
    # frexp has mantissas in [0.5, 1): the exponent of a number 1.xxx * 2^k is k + 1
    step = torch.frexp(numbers).exponent.clamp(min=E5M6_MIN_EXPONENT + 1) - 1 - E5M6_MANTISSA
    unit = torch.ldexp(torch.ones_like(numbers), step)
    return ((numbers / unit).round() * unit * scale).flatten(1)[:, :width].to(torch.bfloat16)
