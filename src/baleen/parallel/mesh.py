"""Where each rank stands: pipeline x replicate x share x expert, the last axis running fastest.

Neighbours in rank order share a node, so what talks most (the experts' all-to-all) lies innermost and what talks least
(the pipeline) outermost, as in V3 (arXiv 2412.19437 §3.2): PP16, and within a stage EP64 over 8 nodes.

    data = replicate * share * expert   ranks of one stage, each with sequences of its own
    shard = share * expert              ranks over which FSDP spreads what it shards; `replicate` groups of them (HSDP)
    replicas = replicate * share        ranks that hold the same routed experts
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from baleen.config import ModelConfig, UserError
from baleen.parallel.stage import split_layers
from baleen.recipe import ParallelConfig

HYBRID = ("replicate", "shard")
STAGES_PER_RANK = {"1f1b": 1, "zbv": 2, "dualpipev": 2}


class Grid(NamedTuple):
    """Ranks along each axis."""

    pipeline: int
    replicate: int
    share: int
    expert: int

    @property
    def world(self) -> int:
        return self.pipeline * self.data

    @property
    def data(self) -> int:
        return self.replicate * self.share * self.expert

    @property
    def replicas(self) -> int:
        return self.replicate * self.share


def make_grid(parallel: ParallelConfig, model: ModelConfig, world: int) -> Grid:
    """The grid of `world` ranks. Raises UserError, naming the nearest that works, for an impossible layout."""
    if parallel.world and parallel.world != world:
        raise UserError(
            f"the recipe is made for {parallel.world} processes and {world} were started: start {parallel.world}, or "
            f"set parallel.world={world} and the degrees with it"
        )
    if parallel.shard and not parallel.zero:
        raise UserError(
            "parallel.shard says over how many ranks zero 1 to 3 spread what they shard: leave it out of zero 0"
        )
    data = _divide(world, parallel.pipeline, "processes", "parallel.pipeline")
    shard = parallel.shard or data
    replicate = _divide(data, shard, "data-parallel ranks", "parallel.shard")
    both = gcd(shard, model.n_routed_experts)
    share = _divide(shard, parallel.expert, "ranks that share one copy of the weights", "parallel.expert", both)
    _divide(model.n_routed_experts, parallel.expert, "routed experts", "parallel.expert", both)
    if parallel.pipeline > 1:
        _check_pipeline(parallel, model)
    return Grid(parallel.pipeline, replicate, share, parallel.expert)


def _divide(number: int, by: int, what: str, key: str, all_divide: int = 0) -> int:
    """all_divide: where `by` must divide more than `number`, their greatest common divisor."""
    if number % by:
        whole = all_divide or number
        near = min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - by))
        raise UserError(f"{number} {what} do not divide by {key} = {by}: the nearest that does is {key} = {near}")
    return number // by


def stages_of(parallel: ParallelConfig) -> int:
    """Stages of the pipeline, over all its ranks."""
    return parallel.pipeline * STAGES_PER_RANK[parallel.schedule]


def least_micro_batches(parallel: ParallelConfig) -> int:
    """Fewer of them PyTorch's schedule does not run."""
    return 1 if parallel.pipeline == 1 or parallel.schedule == "zbv" else stages_of(parallel)


def _check_pipeline(parallel: ParallelConfig, model: ModelConfig) -> None:
    if parallel.zero > 1:
        raise UserError(
            f"parallel.zero={parallel.zero} would move weights or gradients for every micro-batch of a pipeline: "
            "take parallel.zero=1, as V3 does, or 0"
        )
    if model.tie_word_embeddings:
        raise UserError("a model with tie_word_embeddings has one matrix at both ends: take parallel.pipeline=1")
    split_layers(model, stages_of(parallel))


class Mesh:
    """The grid as process groups. Made by all ranks together."""

    def __init__(self, grid: Grid, device_type: str):
        self.grid = grid
        axes = ("pipeline", "replicate", "share", "expert")
        self._all: DeviceMesh = init_device_mesh(device_type, tuple(grid), mesh_dim_names=axes)
        self.data: DeviceMesh = self._all[axes[1:]]._flatten("data")
        self.shard: DeviceMesh = self._all["share", "expert"]._flatten("shard")
        self.replicas: DeviceMesh = self._all["replicate", "share"]._flatten("replicas")
        # FSDP takes (replicate, shard) for HSDP, and one axis where there is only one shard group
        wide = init_device_mesh(
            device_type, (grid.pipeline, grid.replicate, grid.share * grid.expert), mesh_dim_names=("pipeline", *HYBRID)
        )
        self.hybrid: DeviceMesh = wide[HYBRID] if grid.replicate > 1 else self.shard
        self.hybrid_replicas: DeviceMesh = self._all["replicate", "share"] if grid.replicate > 1 else self._all["share"]
        # experts are cut over `expert` first and each part over `share`: the order of a stack on disk
        ranks = torch.arange(grid.world).view(tuple(grid)).transpose(2, 3)
        self.stored_experts: DeviceMesh = DeviceMesh(
            device_type, ranks, mesh_dim_names=("pipeline", "replicate", "expert", "share")
        )["replicate", "expert", "share"]

    @property
    def pipeline_rank(self) -> int:
        return self._all.get_local_rank("pipeline")

    @property
    def data_rank(self) -> int:
        return self.data.get_local_rank()

    @property
    def pipeline_group(self) -> ProcessGroup:
        return self._all.get_group("pipeline")

    @property
    def expert_group(self) -> ProcessGroup:
        return self._all.get_group("expert")
