"""Rows to their experts and back: gathered in their order, weighted and added up where they came from.

Shapes: N tokens of width d, K experts each, M rows sorted by expert; token n's rows stand at slots[n].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from baleen.model.native.training import call, serves


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
            y_NKd = y_Md[slots].view(*slots_NK.shape, y_Md.shape[1])
            grad_weights = (
                (y_NKd @ grad_Nd.to(y_NKd.dtype)[..., None]).squeeze(-1).to(weights_NK.dtype)
            )  # summed in fp32
        return grad_Md, None, grad_weights


def combine_rows(y_Md: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Row n is the sum over k of weights[n, k] * y[slots[n, k]]: [M, d] -> [N, d]; no place is taken twice."""
    out: Tensor = _CombineRows.apply(y_Md, slots_NK, weights_NK)  # type: ignore[assignment]
    return out


def sum_rows(y_Md: Tensor, slots_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    """The forward of `combine_rows`; without weights a plain sum. The terms are added up in fp32 at least, the
    weights rounded to the dtype of y where PyTorch computes."""
    (N, K), d = slots_NK.shape, y_Md.shape[1]
    if serves(y_Md) and (weights_NK is None or weights_NK.dtype is torch.float32):
        out_Nd = y_Md.new_empty(N, d)
        call("sum_rows", (y_Md.dtype,), y_Md, slots_NK, weights_NK, out_Nd, N, K, d)
        return out_Nd
    return sum_rows_twin(y_Md, slots_NK, weights_NK)


def sum_rows_twin(y_Md: Tensor, slots_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    y_NKd = y_Md[slots_NK.flatten()].view(*slots_NK.shape, y_Md.shape[1])
    if weights_NK is None:
        return y_NKd.sum(1)
    return (weights_NK.to(y_NKd.dtype)[:, None] @ y_NKd).squeeze(1)


def spread_rows(x_Nd: Tensor, source_M: Tensor, slots_NK: Tensor) -> Tensor:
    """x[source]: [N, d] -> [M, d]; row n stands at the K places slots[n], and what stands elsewhere has no gradient.

    Autograd's own backward would add rows one by one; this one gathers.
    """
    out: Tensor = _SpreadRows.apply(x_Nd, source_M, slots_NK)  # type: ignore[assignment]
    return out
