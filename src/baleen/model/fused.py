"""Norm, SwiGLU and cross-entropy in one pass over memory each: native on CPUs, PyTorch's own operators elsewhere.

Every function here has its twin beside it, `..._twin`: the same mathematics in PyTorch, which serves where the native
library does not (other devices and dtypes, fake tensors, no compiler) and to which the tests hold it.
Shapes: N rows, d their width, Z = vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from baleen.model.native.training import call, serves

IGNORED = -100  # a target that is not learnt
_NORMS = {(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)}


def rms_norm(x: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in fp32 at least and returned in `dtype`; any shape."""
    if not (serves(x) and weight_d.dtype is torch.float32 and (x.dtype, dtype) in _NORMS):
        return rms_norm_twin(x, weight_d, eps, dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight_d.requires_grad):
        return _RMSNorm.apply(x, weight_d, eps, dtype)  # type: ignore[return-value]
    return _normed(x, weight_d, eps, dtype)[0]


def rms_norm_twin(x: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, weight_d.shape, weight_d.to(x.dtype), eps).to(dtype)


def swiglu(*gate_up: Tensor) -> Tensor:
    """silu(gate) * up: of gate [..., d] and up [..., d], or of both side by side as one tensor [..., 2d]."""
    return _SwiGLU.apply(*gate_up)  # type: ignore[return-value]


def swiglu_twin(*gate_up: Tensor) -> Tensor:
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy_(logits_NZ: Tensor, targets_N: Tensor, weight: float, learns: bool) -> Tensor:
    """Sum of the cross-entropies in nats over targets that are not IGNORED, a scalar in fp32 at least.

    Where it learns, the logits are overwritten by `weight` times their gradient.
    """
    if not serves(logits_NZ):
        return cross_entropy_twin_(logits_NZ, targets_N, weight, learns)
    N, Z = logits_NZ.shape
    if not ((targets_N == IGNORED) | (targets_N >= 0) & (targets_N < Z)).all():
        raise IndexError(f"a target is none of the {Z} entries of the vocabulary")
    loss_N = torch.empty(N)
    room = torch.empty(torch.get_num_threads(), Z)
    call("cross_entropy", (logits_NZ.dtype,), logits_NZ, targets_N.contiguous(), weight, loss_N, room, learns, N, Z)
    return loss_N.sum()


def cross_entropy_twin_(logits_NZ: Tensor, targets_N: Tensor, weight: float, learns: bool) -> Tensor:
    wide = torch.promote_types(logits_NZ.dtype, torch.float32)
    log_probs = F.log_softmax(logits_NZ.to(wide), dim=-1)
    loss = F.nll_loss(log_probs, targets_N, ignore_index=IGNORED, reduction="sum")
    if learns:
        grad = log_probs.exp_()
        grad[torch.arange(len(grad), device=grad.device), targets_N.clamp(min=0)] -= 1.0
        logits_NZ.copy_(grad.masked_fill_((targets_N == IGNORED)[:, None], 0.0).mul_(weight))
    return loss


def _rows(x: Tensor) -> Tensor:
    """[..., d] as [N, d] with contiguous rows; a view where it can be."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _normed(x: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    N, d = rows.shape
    y, scale_N = torch.empty(x.shape, dtype=dtype), torch.empty(N)
    call("rms_norm", (x.dtype, dtype), rows, rows.stride(0), weight_d, y, scale_N, N, d, eps)
    return y, scale_N


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, scale_N = _normed(x, weight_d, eps, dtype)
        ctx.save_for_backward(x, weight_d, scale_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight_d, scale_N = ctx.saved_tensors
        rows, grad = _rows(x), grad.contiguous()
        N, d = rows.shape
        grad_x, parts = torch.empty(x.shape, dtype=x.dtype), torch.zeros(torch.get_num_threads(), d)
        stride = rows.stride(0)
        call("rms_norm_backward", (x.dtype, grad.dtype), grad, rows, stride, weight_d, scale_N, grad_x, parts, N, d)
        return grad_x, parts.sum(0), None, None


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone, where autograd over the twin would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx, *gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(*gate_up)
        if not _serves_all(gate_up):
            return swiglu_twin(*gate_up)
        (gates, ups), stride = _gate_and_up(gate_up)
        N, d = gates.shape
        out = torch.empty((*gate_up[0].shape[:-1], d), dtype=gates.dtype)
        call("swiglu", (gates.dtype,), gates, ups, stride, out, N, d)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        gate_up, grad = ctx.saved_tensors, grad.contiguous()
        if not _serves_all(gate_up):
            gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, dim=-1)
            grads = torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
            return grads if len(gate_up) == 2 else torch.cat(grads, dim=-1)
        (gates, ups), stride = _gate_and_up(gate_up)
        grads = tuple(torch.empty(part.shape, dtype=part.dtype) for part in gate_up)
        (grad_gates, grad_ups), grad_stride = _gate_and_up(grads)
        N, d = gates.shape
        call("swiglu_backward", (gates.dtype,), grad, gates, ups, stride, grad_gates, grad_ups, grad_stride, N, d)
        return grads


def _serves_all(parts: tuple[Tensor, ...]) -> bool:
    return serves(parts[0]) and all(part.dtype is parts[0].dtype for part in parts)


def _gate_and_up(parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], int]:
    """([N, d] each, the distance of their rows) of two tensors or of one that holds both."""
    gates, ups = _rows(parts[0]).chunk(2, dim=-1) if len(parts) == 1 else (_rows(parts[0]), _rows(parts[1]))
    if gates.stride(0) != ups.stride(0):
        gates, ups = gates.contiguous(), ups.contiguous()
    return (gates, ups), gates.stride(0)
