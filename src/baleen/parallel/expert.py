"""Expert parallelism behind the dispatcher's seam: tokens travel to the ranks of their experts and back (V3 §3.2.2).

Shapes: N tokens of this rank, d hidden, E experts in all, K chosen, R ranks, M rows that arrive here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baleen.model.fp8 import dequantize_blocks, quantize_blocks
from baleen.model.moe import DeepseekMoE, Experts, Routing, apply_experts
from baleen.model.rows import combine_rows, spread_rows

ACTIVATION_BLOCK = (1, 128)


class ExpertParallel:
    """A Dispatcher. Rank r of the group holds experts r * E / R to (r + 1) * E / R - 1.

    One row travels for each (token, expert) pair. No token is dropped, so the counts differ from rank to rank and step
    to step; they are exchanged first. fp8: dispatch in E4M3 with a scale per 128 numbers and combine in BF16, forward
    and backward (V3 §3.3); else both in the dtype of the activations.

    node_size: consecutive ranks that share a node, for the count of nodes that tokens reach; 0: one node holds all.
    """

    def __init__(self, group: dist.ProcessGroup, *, fp8: bool = False, node_size: int = 0):
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.out, self.back = (send_fp8, send_bf16) if fp8 else (send_wide, send_wide)
        members = dist.get_process_group_ranks(group)
        self.nodes = [rank // (node_size or 1 + max(members)) for rank in members]
        self.tokens = 0  # that passed since `take_reached`
        self.reached: int | Tensor = 0  # nodes, by each of them, added up

    def take_reached(self) -> tuple[int, int]:
        """(tokens, nodes reached by them) since this was last asked."""
        counts = self.tokens, int(self.reached)
        self.tokens, self.reached = 0, 0
        return counts

    def __call__(self, x_Nd: Tensor, routing: Routing, experts: Experts) -> Tensor:
        N, K = routing.indices_NK.shape
        order = routing.indices_NK.flatten().argsort(stable=True)  # by expert, and so by rank
        slots_NK = torch.empty_like(order).index_copy_(0, order, torch.arange(N * K, device=order.device)).view(N, K)
        load_RE = routing.load().view(self.ranks, -1)
        node_E = torch.tensor(self.nodes, device=order.device).repeat_interleave(load_RE.shape[1])
        self.tokens, self.reached = self.tokens + N, self.reached + nodes_reached(routing, node_E).sum()
        arriving_RE = torch.empty_like(load_RE)
        dist.all_to_all_single(arriving_RE, load_RE, group=self.group)
        there = Trip(load_RE.sum(1).tolist(), arriving_RE.sum(1).tolist(), self.group)

        arrived_Md = exchange(spread_rows(x_Nd, order // K, slots_NK), there, self.out, self.back)
        local_E = torch.arange(load_RE.shape[1], device=order.device).expand_as(arriving_RE)
        expert_M = local_E.flatten().repeat_interleave(arriving_RE.flatten())
        alone_M1 = torch.ones(len(expert_M), 1, dtype=routing.weights_NK.dtype, device=order.device)
        y_Md = apply_experts(arrived_Md, expert_M[:, None], alone_M1, arriving_RE.sum(0), experts)
        returned = exchange(y_Md, there.reversed(), self.back, self.out)
        return combine_rows(returned, slots_NK, routing.weights_NK)


class Trip(NamedTuple):
    """Rows sent to and received from each rank of a group."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup

    def reversed(self) -> Trip:
        return Trip(self.received, self.sent, self.group)

    def all_to_all(self, rows: Tensor) -> Tensor:
        """[sum(sent), d] -> [sum(received), d], in the order of ranks."""
        out = rows.new_empty(sum(self.received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), self.received, self.sent, group=self.group)
        return out


Send = Callable[[Tensor, Trip], Tensor]


def send_wide(rows: Tensor, trip: Trip) -> Tensor:
    return trip.all_to_all(rows)


def send_bf16(rows: Tensor, trip: Trip) -> Tensor:
    return trip.all_to_all(rows.bfloat16()).to(rows.dtype)


def send_fp8(rows: Tensor, trip: Trip) -> Tensor:
    """In tiles of 1 x 128, by powers of two (V3 §3.3.3). Float8 travels as its bytes, which every backend can carry."""
    numbers, scales = quantize_blocks(rows, ACTIVATION_BLOCK, power_of_two=True)
    arrived = trip.all_to_all(numbers.view(torch.uint8)).view(numbers.dtype)
    return dequantize_blocks(arrived, trip.all_to_all(scales), ACTIVATION_BLOCK).to(rows.dtype)


def exchange(rows: Tensor, trip: Trip, send: Send, send_back: Send) -> Tensor:
    """rows through `send`; their gradients come back through `send_back`."""
    out: Tensor = _Exchange.apply(rows, trip, send, send_back)  # type: ignore[assignment]
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, trip: Trip, send: Send, send_back: Send) -> Tensor:
        ctx.trip, ctx.send_back = trip.reversed(), send_back
        return send(rows, trip)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return ctx.send_back(grad, ctx.trip), None, None, None


def nodes_reached(routing: Routing, node_E: Tensor) -> Tensor:
    """Distinct nodes that the experts of each token lie on, int64 [N]: at most topk_group where a node is a group.

    node_E: the node of each expert, int64.
    """
    node_NK = node_E[routing.indices_NK].sort(-1).values
    return 1 + (node_NK.diff(dim=-1) != 0).sum(-1)


def shard_experts(module: nn.Module, group: dist.ProcessGroup, *, fp8: bool, node_size: int) -> None:
    """Give every MoE layer in `module` an ExpertParallel, and keep only this rank's experts of each stack."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for moe in module.modules():
        if isinstance(moe, DeepseekMoE):
            for name, stack in list(moe.experts.named_parameters()):
                setattr(moe.experts, name, nn.Parameter(stack.detach().chunk(ranks)[rank].clone()))
            moe.dispatch = ExpertParallel(group, fp8=fp8, node_size=node_size)
