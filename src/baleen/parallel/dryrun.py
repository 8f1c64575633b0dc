"""A training step of any number of ranks, on one CPU and without memory: fake tensors over torch's fake process group.

What runs is the code of training: the model is cut and sharded, and a micro-batch passes the rank's stages forward and
backward. What is counted are the tensors and the collectives themselves; no formula of `baleen.cost` is used. Routing
is made even, for fake scores route nothing. Sizes are bytes; weights, gradients and moments are as training holds them.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from baleen.config import ModelConfig
from baleen.model.moe import DeepseekMoE, Experts, Gate, Routing
from baleen.model.rows import combine_rows, spread_rows
from baleen.model.transformer import Transformer
from baleen.parallel.expert import ExpertParallel, Trip, exchange
from baleen.parallel.mesh import Grid, Mesh, make_grid
from baleen.parallel.recompute import recompute
from baleen.parallel.stage import Objective, Stage
from baleen.parallel.team import Team, local, take_part
from baleen.parallel.worker import MicroBatch
from baleen.recipe import ParallelConfig


class RankCount(NamedTuple):
    """What the first rank of each pipeline position holds and sends."""

    rank: int
    parameters: int
    weights: int  # between steps, as are the gradients
    gradients: int
    step_weights: int  # within one: gathered, or with ZeRO-3 as before
    step_gradients: int
    optimizer: int  # AdamW's two moments
    kept: int  # for the backward of one micro-batch
    inputs: int  # of its stages, from others and for one micro-batch; among what is kept
    returned: int  # gradients of its stages' outputs, likewise
    traffic: dict[str, int]  # bytes handed to each kind of collective, for one micro-batch with its reduction
    leaving: dict[str, float]  # of them, what leaves the rank: a collective is sent as a ring sends it


def dry_run(
    config: ModelConfig, parallel: ParallelConfig, objective: Objective, *, world: int, sequences: int, seq_len: int
) -> dict[str, Any]:
    """{grid, parameters, ranks: RankCounts as dicts}; `sequences` of a micro-batch.

    parameters: of the whole model, each once, wherever its shards and copies lie. Raises UserError for an impossible
    layout.
    """
    grid = make_grid(parallel, config, world)
    positions = [position * grid.data for position in range(grid.pipeline)]
    counts, sizes = zip(
        *(_count(config, parallel, objective, grid, rank, sequences, seq_len) for rank in positions), strict=True
    )
    ranks = [count._asdict() for count in counts]
    return {"grid": grid._asdict(), "parameters": sum(ChainMap(*sizes).values()), "ranks": ranks}


def _count(
    config: ModelConfig, parallel: ParallelConfig, objective: Objective, grid: Grid, rank: int, sequences: int, T: int
) -> tuple[RankCount, dict[str, int]]:
    """With the sizes of the parameters that it has a part of, by name."""
    with _fake_group(rank, grid.world):
        mesh = Mesh(grid, "cpu")  # of real numbers
        return _count_fakes(config, parallel, objective, mesh, rank, sequences, T)


def _count_fakes(
    config: ModelConfig, parallel: ParallelConfig, objective: Objective, mesh: Mesh, rank: int, sequences: int, T: int
) -> tuple[RankCount, dict[str, int]]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        team = take_part(Transformer(config), parallel, mesh)
        for part in team.parts:
            _route_evenly(part)
        kept: dict[int, int] = {}  # bytes by storage
        of_weights: set[int] = set()  # storages

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            return tensor

        def weigh(module: nn.Module, arguments: object = None) -> None:
            of_weights.update(local(p).untyped_storage()._cdata for p in module.parameters(recurse=False))

        for part in team.parts:
            recompute(part, parallel.recompute, note)
            for module in part.modules():
                module.register_forward_pre_hook(weigh)  # when FSDP has gathered them
        shares = torch.ones(2 + team.config.num_nextn_predict_layers)
        micro_batch = MicroBatch(torch.zeros(sequences, T + 1, dtype=torch.int64), None, None, shares)
        with Traffic() as traffic:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                outputs = _forward(team, objective, micro_batch)
            for module in [m for part in team.parts for m in part.modules()]:
                weigh(module)  # the head is read without being called
            for out in reversed(outputs):  # unheard: what is recomputed here was not kept
                out.backward(torch.zeros_like(out))
            team.bring_gradients()
        sizes = {  # of DTensors, the whole
            name: p.numel() * (mesh.grid.expert if ".experts." in name else 1)
            for part in team.parts
            for name, p in part.named_parameters()
        }
        weights = sum(p.numel() * p.element_size() for p in team.parameters.values())
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in team.parameters.values() if p.grad is not None)
        whole = sum(p.numel() * p.element_size() for part in team.parts for _, p in part.named_parameters())
        handed_on = 4 * sequences * T * config.hidden_size  # bytes, from stage to stage
        stages = [part for part in team.parts if isinstance(part, Stage)]
        count = RankCount(
            rank=rank,
            parameters=sum(p.numel() for p in team.parameters.values()),
            weights=weights,
            gradients=gradients,
            step_weights=weights if parallel.zero == 3 else whole,
            step_gradients=whole if parallel.zero <= 1 else gradients,
            optimizer=2 * weights,
            kept=sum(size for storage, size in kept.items() if storage not in of_weights),
            inputs=handed_on * sum(not stage.first for stage in stages),
            returned=handed_on * sum(not stage.last for stage in stages),
            traffic=dict(traffic.bytes),
            leaving=dict(traffic.leaving),
        )
        return count, sizes


def _forward(team: Team, objective: Objective, micro_batch: MicroBatch) -> list[Tensor]:
    """One micro-batch through what the rank holds, output by output; a stage's input comes from nowhere."""
    if isinstance(team.parts[0], Transformer):
        return [objective.of_model(team.parts[0], micro_batch.tokens, None, None).total]
    tokens = micro_batch.tokens
    B, width = tokens.shape
    outputs = []
    for stage in team.parts:
        assert isinstance(stage, Stage)
        stage.objective, stage.told = objective, []
        x = torch.zeros(B, width - 1, team.config.hidden_size, requires_grad=True)
        outputs.append(stage(tokens if stage.first else x, tokens, micro_batch.shares[None]))
    return outputs


class _Even(Routing):
    """As many tokens for each expert as for any other."""

    def load(self) -> Tensor:
        N, K = self.indices_NK.shape
        E = self.scores_NE.shape[1]
        return self.indices_NK.new_full((E,), N * K // E)


class _EvenDispatch(ExpertParallel):
    """ExpertParallel's rows and exchanges, with counts that are known without looking."""

    def __init__(self, like: object, experts: int):
        self.local = experts
        self.ranks = 1
        if isinstance(like, ExpertParallel):
            self.group, self.ranks, self.out, self.back = like.group, like.ranks, like.out, like.back

    def __call__(self, x_Nd: Tensor, routing: Routing, experts: Experts) -> Tensor:
        N, K = routing.indices_NK.shape
        order = torch.zeros(N * K, dtype=torch.int64)
        rows = spread_rows(x_Nd, order, order.view(N, K))
        if self.ranks > 1:
            each = _evenly(N * K, self.ranks)
            there = Trip(each, each, self.group)
            rows = exchange(rows, there, self.out, self.back)
        y_Md = experts(rows, _evenly(N * K, self.local))
        if self.ranks > 1:
            y_Md = exchange(y_Md, there.reversed(), self.back, self.out)
        return combine_rows(y_Md, order.view(N, K), routing.weights_NK)


def _evenly(total: int, parts: int) -> list[int]:
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _route_evenly(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, DeepseekMoE):
            module.dispatch = _EvenDispatch(module.dispatch, module.experts.gate_up_proj.shape[0])
        if isinstance(module, Gate):
            module.register_forward_hook(_make_even)


def _make_even(gate: nn.Module, arguments: Any, routing: Routing) -> Routing:
    return _Even(*routing)


# What leaves a rank of n by a ring, as a share of what it hands over.
LEAVING = {
    "allgather_base": lambda n: n - 1,
    "reduce_scatter_base": lambda n: (n - 1) / n,
    "allreduce": lambda n: 2 * (n - 1) / n,
    "send": lambda n: 1,  # from stage to stage
    "recv": lambda n: 0,
}


class Traffic(TorchDispatchMode):
    """Bytes of every collective's input by its name, and what of them leaves the rank: of fake ones and real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self.leaving: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            kind, sent, group = func._schema.name.split("::")[1].strip("_"), _sent(args), _group(args)
            self.bytes[kind] += sent
            if kind == "alltoall_base":
                self.leaving[kind] += sent * _elsewhere(args[4] or [1] * group.size(), group.rank())
            else:
                self.leaving[kind] += sent * LEAVING[kind](group.size())
        return func(*args, **(kwargs or {}))


def _sent(args: tuple[Any, ...]) -> int:
    """Of the last tensors among the arguments: c10d names outputs before inputs."""
    found = [a if isinstance(a, list | tuple) else [a] for a in args]
    lists = [[t for t in a if isinstance(t, Tensor)] for a in found]
    inputs = [tensors for tensors in lists if tensors][-1]
    return sum(t.numel() * t.element_size() for t in inputs)


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """The first object among the arguments that is no tensor: so all of c10d's collectives have it."""
    return dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))


def _elsewhere(rows: list[int], rank: int) -> float:
    """The share of an all-to-all's rows, counted by receiver, that other ranks receive."""
    return 1 - rows[rank] / sum(rows) if sum(rows) else 0.0


@contextmanager
def _fake_group(rank: int, world: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
