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
    if torch.is_autocast_enabled(x_MI.device.type):
        dtype = torch.get_autocast_dtype(x_MI.device.type)
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


class _TakeRows(torch.autograd.Function):
    """x[source], whose backward gathers too: each row of x is taken exactly K times, at inverse.view(-1, K)."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (inverse_NK,) = ctx.saved_tensors
        taken = grad.index_select(0, inverse_NK.flatten())
        return taken.view(*inverse_NK.shape, -1).sum(1), None, None


def take_rows(x_Nd: Tensor, source_M: Tensor, inverse_NK: Tensor) -> Tensor:
    """x[source]: [N, d] -> [M, d], where row n of x is wanted at the K places inverse[n] (M = N * K)."""
    out: Tensor = _TakeRows.apply(x_Nd, source_M, inverse_NK)  # type: ignore[assignment]
    return out
