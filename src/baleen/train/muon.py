"""Muon (Jordan et al. 2024; arXiv 2502.16982) for single matrices and for stacks of experts.

torch.optim.Muon takes 2-D parameters only. Here the Newton-Schulz iteration is batched over the expert axis, and a
stacked `gate_up_proj` is two matrices an expert; small matrices of one shape, which cost more to dispatch than to
multiply, are stacked for it. Each matrix gets what torch.optim.Muon with adjust_lr_fn="match_rms_adamw" gives it, so
one learning rate and weight decay serves Muon and AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
EPS = 1e-7
SMALL = 1 << 18  # numbers: larger matrices fill the cores by themselves, and a copy of them all would take memory


def orthogonalize(grad_SMN: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of each slice's singular value decomposition, roughly, by a quintic Newton-Schulz iteration in `dtype`."""
    a, b, c = NS_COEFFICIENTS
    x = grad_SMN.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(grad_SMN.dtype)


class Muon(torch.optim.Optimizer):
    """Groups: {"params": [...], "matrices": m}: every parameter is a stack of matrices, each of them m blocks of rows.

    lr, weight_decay (decoupled), momentum (Nesterov) as in torch.optim.Muon. dtype: of the iteration; bfloat16 where
    the hardware multiplies it, float32 elsewhere.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "matrices": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            alike: dict[object, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    small = parameter.ndim == 2 and parameter.numel() <= SMALL
                    alike[parameter.shape if small else id(parameter)].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        """Of parameters of one shape."""
        shape = parameters[0].shape
        rows, columns = shape[-2] // group["matrices"], shape[-1]
        steps = [self._nesterov(parameter, group["momentum"]) for parameter in parameters]
        stacked = torch.stack(steps) if len(steps) > 1 else steps[0]
        updates = orthogonalize(stacked.reshape(-1, rows, columns), self.dtype).reshape(len(steps), *shape)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)
