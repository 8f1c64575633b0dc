"""Expert parallelism behind the dispatcher's seam: tokens travel to the ranks of their experts and back (V3 §3.2.2).

Shapes: N tokens of this rank, d hidden, E experts in all, K chosen, R ranks, M rows that arrive here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baleen.model.grouped import combine_rows, spread_rows
from baleen.model.moe import DeepseekMoE, Experts, Routing, apply_experts


class ExpertParallel:
    """A Dispatcher. Rank r of the group holds experts r * E / R to (r + 1) * E / R - 1.

    One row travels for each (token, expert) pair, in the dtype of the activations. No token is dropped, so the counts
    differ from rank to rank and step to step; they are exchanged first.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rows_sent = 0  # to other ranks, forward and backward: for counting traffic

    def __call__(self, x_Nd: Tensor, routing: Routing, experts: Experts) -> Tensor:
        N, K = routing.indices_NK.shape
        order = routing.indices_NK.flatten().argsort(stable=True)  # by expert, and so by rank
        slots_NK = torch.empty_like(order).index_copy_(0, order, torch.arange(N * K, device=order.device)).view(N, K)
        load_RE = routing.load().view(self.ranks, -1)
        arriving_RE = torch.empty_like(load_RE)
        dist.all_to_all_single(arriving_RE, load_RE, group=self.group)
        sent, arriving = load_RE.sum(1).tolist(), arriving_RE.sum(1).tolist()

        arrived_Md = exchange(spread_rows(x_Nd, order // K, slots_NK), sent, arriving, self.group)
        local_E = torch.arange(load_RE.shape[1], device=order.device).expand_as(arriving_RE)
        expert_M = local_E.flatten().repeat_interleave(arriving_RE.flatten())
        alone_M1 = torch.ones(len(expert_M), 1, dtype=routing.weights_NK.dtype, device=order.device)
        y_Md = apply_experts(arrived_Md, expert_M[:, None], alone_M1, arriving_RE.sum(0), experts)
        returned = exchange(y_Md, arriving, sent, self.group)
        return combine_rows(returned, slots_NK, routing.weights_NK)


def exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of rows [sum(sent), d] -> [sum(received), d], to and from each rank in turn; gradients go back."""
    out: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[assignment]
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        sent, received = ctx.counts
        return _all_to_all(grad, received, sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def shard_experts(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every MoE layer in `module` an ExpertParallel, and keep only this rank's experts of each stack."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for moe in module.modules():
        if isinstance(moe, DeepseekMoE):
            for name, stack in list(moe.experts.named_parameters()):
                setattr(moe.experts, name, nn.Parameter(stack.detach().chunk(ranks)[rank].clone()))
            moe.dispatch = ExpertParallel(group)
