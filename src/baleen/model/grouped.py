"""Matmuls over sorted, contiguous groups of rows: the kernel under the routed experts.

Shapes: M rows sorted by expert, E experts, I inputs, O outputs; group e is rows offsets[e-1] to offsets[e].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from baleen.model.native.training import call, serves


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
        return sum_rows(grad_Md.contiguous(), slots_NK, None), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_Md: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_Md, slots_NK, weights_NK)
        return sum_rows(y_Md, slots_NK, weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_Nd: Tensor):  # type: ignore[override]
        y_Md, slots_NK, weights_NK = ctx.saved_tensors
        everywhere = slots_NK.numel() == len(y_Md)  # no row is padding
        grad_Md = torch.empty_like(y_Md) if everywhere else torch.zeros_like(y_Md)
        if serves(y_Md) and weights_NK.dtype is torch.float32:
            grad_weights, (N, K), d = torch.empty_like(weights_NK), slots_NK.shape, y_Md.shape[1]
            operands = (grad_Nd.contiguous(), y_Md, slots_NK, weights_NK)
            call("sum_rows_backward", (y_Md.dtype,), *operands, grad_Md, grad_weights, N, K, d)
        else:
            slots = slots_NK.flatten()
            grad_NKd = weights_NK[..., None].to(grad_Nd.dtype) * grad_Nd[:, None]
            grad_Md.index_copy_(0, slots, grad_NKd.flatten(0, 1).to(y_Md.dtype))
            grad_weights = (y_Md[slots].view(*slots_NK.shape, -1) * grad_Nd[:, None]).sum(-1).to(weights_NK.dtype)
        return grad_Md, None, grad_weights


def combine_rows(y_Md: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Row n is the sum over k of weights[n, k] * y[slots[n, k]]: [M, d] -> [N, d]; no place is taken twice."""
    out: Tensor = _CombineRows.apply(y_Md, slots_NK, weights_NK)  # type: ignore[assignment]
    return out


def sum_rows(y_Md: Tensor, slots_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    """The forward of `combine_rows`; without weights a plain sum. The terms are added up in fp32 at least."""
    (N, K), d = slots_NK.shape, y_Md.shape[1]
    if serves(y_Md) and (weights_NK is None or weights_NK.dtype is torch.float32):
        out_Nd = y_Md.new_empty(N, d)
        call("sum_rows", (y_Md.dtype,), y_Md, slots_NK, weights_NK, out_Nd, N, K, d)
        return out_Nd
    return sum_rows_twin(y_Md, slots_NK, weights_NK)


def sum_rows_twin(y_Md: Tensor, slots_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    y_NKd = y_Md[slots_NK.flatten()].view(*slots_NK.shape, -1)
    if weights_NK is None:
        return y_NKd.sum(1)
    return (weights_NK.to(y_NKd.dtype)[:, None] @ y_NKd).squeeze(1)


def spread_rows(x_Nd: Tensor, source_M: Tensor, slots_NK: Tensor) -> Tensor:
    """x[source]: [N, d] -> [M, d]; row n stands at the K places slots[n], and what stands elsewhere has no gradient.

    Autograd's own backward would add rows one by one; this one gathers.
    """
    out: Tensor = _SpreadRows.apply(x_Nd, source_M, slots_NK)  # type: ignore[assignment]
    return out
