"""Matmuls over sorted, contiguous groups of rows: the kernel under the routed experts.

Shapes: M rows sorted by expert, E experts, I inputs, O outputs; group e is rows offsets[e-1] to offsets[e].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts: list[int] | Tensor) -> Tensor:
    """Rows of group e times weight[e]ᵀ: [M, I] x [E, O, I] -> [M, O].

    counts: rows per expert, summing to M: a list on CPUs; on GPUs an int tensor [E], so that nothing waits for it.
    """
    dtype = _compute_dtype(x_MI)
    x_MI, weight_EOI = x_MI.to(dtype), weight_EOI.to(dtype)
    if isinstance(counts, Tensor):
        offsets = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=offsets)
    out: Tensor = _GroupedLinear.apply(x_MI, weight_EOI, counts)  # type: ignore[assignment]
    return out


def grouped_linear_loop(x_MI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    """The slow twin of `grouped_linear`: one F.linear an expert, autograd's own backward."""
    return torch.cat([F.linear(rows, w) for rows, w in zip(x_MI.split(counts), weight_EOI, strict=True)])


class _GroupedLinear(torch.autograd.Function):
    """Writes into outputs allocated once; autograd over a loop would zero and add a full [E, O, I] per expert."""

    @staticmethod
    def forward(ctx, x_MI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_MI, weight_EOI)
        ctx.counts = counts
        out_MO = x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])
        for rows, w, out in zip(x_MI.split(counts), weight_EOI, out_MO.split(counts), strict=True):
            torch.mm(rows, w.t(), out=out)
        return out_MO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MO: Tensor):  # type: ignore[override]
        x_MI, weight_EOI = ctx.saved_tensors
        grad_x, grad_w = torch.empty_like(x_MI), torch.empty_like(weight_EOI)
        grads = grad_MO.contiguous().split(ctx.counts)
        for e, (rows, grad, out) in enumerate(
            zip(x_MI.split(ctx.counts), grads, grad_x.split(ctx.counts), strict=True)
        ):
            torch.mm(grad, weight_EOI[e], out=out)
            torch.mm(grad.t(), rows, out=grad_w[e])
        return grad_x, grad_w, None


def row_alignment(x: Tensor) -> int:
    """What the rows of each group are rounded up to before `grouped_linear`.

    oneDNN, which multiplies bf16 on CPUs, compiles a kernel for each shape it meets: without rounding, expert batches
    never repeat a shape, and a matmul of an S-sized expert took 0.9 ms instead of 0.2.
    """
    return 32 if x.device.type == "cpu" and _compute_dtype(x) == torch.bfloat16 else 1


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_Nd: Tensor, source_M: Tensor, slots_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slots_NK)
        return x_Nd.index_select(0, source_M)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_Md: Tensor):  # type: ignore[override]
        (slots_NK,) = ctx.saved_tensors
        return grad_Md.index_select(0, slots_NK.flatten()).view(*slots_NK.shape, -1).sum(1), None, None


class _CollectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_Md: Tensor, slots_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slots_NK)
        ctx.rows = y_Md.shape[0]
        return y_Md.index_select(0, slots_NK.flatten()).view(*slots_NK.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NKd: Tensor):  # type: ignore[override]
        (slots_NK,) = ctx.saved_tensors
        grad_Md = grad_NKd.new_zeros(ctx.rows, grad_NKd.shape[-1])
        return grad_Md.index_copy_(0, slots_NK.flatten(), grad_NKd.flatten(0, 1)), None


def spread_rows(x_Nd: Tensor, source_M: Tensor, slots_NK: Tensor) -> Tensor:
    """x[source]: [N, d] -> [M, d]; row n stands at the K places slots[n], and what stands elsewhere has no gradient.

    Autograd's own backward would add rows one by one; this one gathers.
    """
    out: Tensor = _SpreadRows.apply(x_Nd, source_M, slots_NK)  # type: ignore[assignment]
    return out


def collect_rows(y_Md: Tensor, slots_NK: Tensor) -> Tensor:
    """y[slots]: [M, d] -> [N, K, d]; no place is collected twice."""
    out: Tensor = _CollectRows.apply(y_Md, slots_NK)  # type: ignore[assignment]
    return out
