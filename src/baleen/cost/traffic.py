"""Bytes that leave a rank: experts' all-to-all, tensor, pipeline and data parallelism. Per token unless said otherwise.

Link times are `baleen.cost.step`'s; here are only counts. A collective over n ranks is counted as a ring sends it:
(n - 1) / n of the data for a gather or a reduce-scatter, twice that for an all-reduce.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

from baleen.cost.architecture import Architecture
from baleen.cost.layout import Layout
from baleen.cost.memory import STATE_BYTES, StageParameters

BF16 = 2
DISPATCH_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1 + 4 / 128}  # FP8 with an FP32 scale per 128 (2412.19437 §3.3)
COMBINE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 2.0}  # V3 combines in BF16


class AllToAll(NamedTuple):
    """Bytes a rank sends per token and MoE layer, forward (dispatch and combine); backward sends as much again."""

    network: float  # between domains: one copy for each domain a token visits
    fast_link: float  # inside a domain


def expected_places(places: int, chosen: int, items: int, limit: int | None = None) -> float:
    """Distinct places that `chosen` of `items` lie in, drawn evenly, with items spread evenly over places.

    `limit` is a router that never visits more (V3: 4 nodes): an upper bound that such a router also nearly reaches.
    """
    if places <= 1:
        return 1.0
    each = items // places
    missed = comb(items - each, chosen) / comb(items, chosen) if items - each >= chosen else 0.0
    expected = places * (1 - missed)
    return min(expected, limit) if limit else expected


def expert_all_to_all(
    arch: Architecture, layout: Layout, domain: int, precision: str, node_limit: int | None = None
) -> AllToAll:
    """All-to-all of one MoE layer; `domain` devices share the fast link.

    Dispatchers made for a node limit (DeepEP) send a token to a domain once and copy it there; ordinary ones send a
    copy for each expert.
    """
    if not arch.is_moe or layout.expert == 1:
        return AllToAll(0.0, 0.0)
    bytes_each = arch.hidden_size * (DISPATCH_BYTES[precision] + COMBINE_BYTES[precision])
    experts, chosen = arch.n_routed_experts, arch.num_experts_per_tok
    nodes = max(1, layout.expert // domain)
    ranks = expected_places(layout.expert, chosen, experts)
    visited = expected_places(nodes, chosen, experts, node_limit) if node_limit else chosen
    remote = visited * (nodes - 1) / nodes  # the own node is as likely as any other
    return AllToAll(network=remote * bytes_each, fast_link=ranks * (1 - 1 / min(layout.expert, domain)) * bytes_each)


def tensor_bytes(arch: Architecture, layout: Layout) -> float:
    """Bytes per token and layer, forward: two all-reduces of the residual stream (gather + scatter under SP)."""
    ranks = layout.tensor
    return 2 * 2 * (ranks - 1) / ranks * arch.hidden_size * BF16


def context_bytes(arch: Architecture, layout: Layout) -> float:
    """Bytes a rank sends per token of its own and layer, forward: keys and values, passed once round the ring."""
    width = arch.num_key_value_heads * (arch.qk_head_dim + arch.v_head_dim)
    return (layout.context - 1) * width * BF16 / layout.tensor


def pipeline_bytes(arch: Architecture, layout: Layout) -> float:
    """Bytes a rank sends per token, forward: the residual stream at each boundary of its model chunks."""
    if layout.pipeline == 1:
        return 0.0
    split = layout.tensor if layout.sequence_parallel else 1
    return layout.chunks / layout.pipeline * arch.hidden_size * BF16 / split


class DataBytes(NamedTuple):
    """Bytes of a step by what is replicated: experts have fewer replicas, and those lie further apart."""

    shared: float
    experts: float


def data_bytes(held: StageParameters, layout: Layout, precision: str, micro_batches: int) -> DataBytes:
    """Bytes a rank sends per *step* to keep the data-parallel replicas, DualPipe's two copies among them, alike.

    DDP all-reduces gradients; ZeRO-1 and -2 scatter gradients and gather weights; FSDP gathers weights for every
    forward and backward of every micro-batch, and scatters gradients. Replicas of an HSDP shard all-reduce besides.
    """
    state, copies = STATE_BYTES[precision], layout.copies
    weight = 4 if precision == "fp32" else BF16  # what weights travel in

    def sent(parameters: float, ranks: int) -> float:
        share = (ranks - 1) / ranks
        gradient = min(state.gradient, 4) * parameters
        if layout.zero == 3:
            shard = min(ranks, layout.shard_ranks) or 1
            inside = (shard - 1) / shard
            replicas = ranks // shard
            gathered = inside * parameters * (2 * weight * micro_batches + state.gradient * micro_batches)
            return gathered + 2 * (replicas - 1) / replicas * gradient / shard
        if layout.zero == 0:
            return 2 * share * gradient
        return share * (gradient + weight * parameters)

    return DataBytes(
        sent(copies * held.shared, copies * layout.data * layout.context),
        sent(copies * held.experts, copies * layout.expert_replicas),
    )
