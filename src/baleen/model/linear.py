"""Matmuls by weights, of all rows by one matrix or of sorted, contiguous groups of rows by one each.

Shapes: M rows, E experts (or one, whose dimension may be missing), I inputs, O outputs; counts: rows of each group,
summing to M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baleen.model.native.training import call, multiplies, serves


class Linear(nn.Linear):
    """nn.Linear, native on CPUs where `multiplies` says so: faster, and of one derivative alone."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """F.linear: [..., I] -> [..., O]."""
    dtype = _compute_dtype(x)
    alike = x.dtype is weight_OI.dtype or torch.is_autocast_enabled(x.device.type)
    if x.ndim < 2 or not (alike and serves(x) and serves(weight_OI) and multiplies(dtype)):
        return F.linear(x, weight_OI, bias_O)
    rows_MI = x.flatten(0, -2)
    y = grouped_linear(rows_MI, weight_OI, [len(rows_MI)]).unflatten(0, x.shape[:-1])
    return y if bias_O is None else y + bias_O.to(y.dtype)


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts: list[int] | Tensor) -> Tensor:
    """Rows of group e times weight[e]ᵀ: [M, I] x [E, O, I] -> [M, O].

    counts: a list on CPUs; on GPUs an int tensor [E], so that nothing waits for it.
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
        return products(x_MI, weight_EOI, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MO: Tensor):  # type: ignore[override]
        (x_MI, weight_EOI), (wants_x, wants_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
        grad_x = grad_weight = None
        if wants_x:
            grad_x = input_gradients(grad_MO, weight_EOI, ctx.counts, torch.empty_like(x_MI))
        if wants_weight:
            grad_weight = weight_gradients(grad_MO, x_MI, ctx.counts, torch.empty_like(weight_EOI))
        return grad_x, grad_weight, None


def products(x_MI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    """x[e] weight[e]ᵀ, [M, O]."""
    out_MO = x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[-2])
    E, outputs, inputs = sizes = _sizes(x_MI, weight_EOI, out_MO, counts)
    if _native(x_MI, weight_EOI, out_MO):
        x, weight = _rows(x_MI), weight_EOI.contiguous()
        call("linear", (x.dtype,), x, x.stride(0), weight, out_MO, torch.tensor(counts), E, inputs, outputs)
        return out_MO
    weights = weight_EOI.view(sizes)
    for rows, w, out in zip(x_MI.split(counts), weights, out_MO.split(counts), strict=True):
        torch.mm(rows, w.t(), out=out)
    return out_MO


def input_gradients(grad_MO: Tensor, weight_EOI: Tensor, counts: list[int], out_MI: Tensor) -> Tensor:
    """grad[e] weight[e], written to out [M, I]."""
    grad_MO = grad_MO.contiguous()
    E, outputs, inputs = sizes = _sizes(out_MI, weight_EOI, grad_MO, counts)
    if _native(grad_MO, weight_EOI, out_MI) and out_MI.is_contiguous():
        weight = weight_EOI.contiguous()
        call("linear_dx", (weight.dtype,), grad_MO, weight, out_MI, torch.tensor(counts), E, inputs, outputs)
        return out_MI
    weights = weight_EOI.view(sizes)
    for grad, w, out in zip(grad_MO.split(counts), weights, out_MI.split(counts), strict=True):
        torch.mm(grad, w, out=out)
    return out_MI


def weight_gradients(grad_MO: Tensor, x_MI: Tensor, counts: list[int], out_EOI: Tensor, *, add: bool = False) -> Tensor:
    """grad[e]ᵀ x[e], written or added to out [E, O, I]."""
    grad_MO = grad_MO.contiguous()
    E, outputs, inputs = sizes = _sizes(x_MI, out_EOI, grad_MO, counts)
    if _native(grad_MO, x_MI, out_EOI) and out_EOI.is_contiguous():
        x = _rows(x_MI)
        ends = (torch.tensor(counts), int(add), E, inputs, outputs)
        call("linear_dw", (x.dtype,), grad_MO, x, x.stride(0), out_EOI, *ends)
        return out_EOI
    groups = zip(grad_MO.split(counts), x_MI.split(counts), out_EOI.view(sizes), strict=True)
    for grad, rows, out in groups:
        out.addmm_(grad.t(), rows) if add else torch.mm(grad.t(), rows, out=out)
    return out_EOI


def _sizes(x_MI: Tensor, weight_EOI: Tensor, y_MO: Tensor, counts: list[int]) -> tuple[int, int, int]:
    """E, O, I: native kernels trust them."""
    E, (outputs, inputs) = len(counts), weight_EOI.shape[-2:]
    assert x_MI.shape == (sum(counts), inputs), f"{list(x_MI.shape)} inputs of groups {counts} by {inputs} weights"
    assert y_MO.shape == (sum(counts), outputs), f"{list(y_MO.shape)} outputs of groups {counts} by {outputs} weights"
    assert weight_EOI.shape[:-2].numel() == E, f"weights {list(weight_EOI.shape)} for {E} groups"
    return E, outputs, inputs


def row_alignment(x: Tensor) -> int:
    """What the rows of each group are rounded up to before `grouped_linear`.

    oneDNN, which multiplies bf16 on CPUs where no native kernel does, compiles a kernel for each shape it meets:
    without rounding, expert batches never repeat a shape, and a matmul of an S-sized expert took 0.9 ms, not 0.2.
    """
    dtype = _compute_dtype(x)
    by_onednn = x.device.type == "cpu" and dtype == torch.bfloat16 and not (serves(x) and multiplies(dtype))
    return 32 if by_onednn else 1


def _native(*operands: Tensor) -> bool:
    dtype = operands[0].dtype
    return all(x.dtype is dtype and serves(x) for x in operands) and multiplies(dtype)


def _rows(x_MI: Tensor) -> Tensor:
    return x_MI if x_MI.stride(-1) == 1 else x_MI.contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
