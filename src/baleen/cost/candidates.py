"""Layouts worth trying for a run, and the fastest of them that fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from pydantic import ValidationError

from baleen.config import UserError
from baleen.cost.architecture import Architecture
from baleen.cost.calibration import Calibration
from baleen.cost.hardware import Hardware
from baleen.cost.layout import Layout, Recompute, StatedLayout
from baleen.cost.memory import RankMemory, rank_memory
from baleen.cost.step import Rooflines, Workload, rooflines, seconds_without_bubble, step_time

MEMORY_SHARE = 0.95  # of the device that a run may plan to fill: the rest is for the context and the allocator
PIPELINES = (1, 2, 4, 8, 16, 32, 64)
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE: tuple[Recompute, ...] = ("none", "deepseek", "operators", "full")
# More model parallelism than fits already only adds traffic and bubbles; this much more is still tried.
WORTH_TRYING = 16


class Choice(NamedTuple):
    layout: Layout
    memory: RankMemory
    seconds: float


def candidate_layouts(
    arch: Architecture, hardware: Hardware, devices: int, batch: int, stated: StatedLayout
) -> Iterator[Layout]:
    """Layouts that divide, keep what is stated, and give every data-parallel rank a sequence.

    In order of rising model parallelism (TP x PP), and of rising recomputation for each.
    """
    tensors: tuple[int, ...] = (stated.tensor or 1,)
    pipelines: tuple[int, ...] = (stated.pipeline or 1,)
    experts: tuple[int, ...] = (stated.expert or 1,)
    if not stated.states_degrees:
        tensors = tuple(t for t in (1, 2, 4, 8) if t <= hardware.domain and not arch.num_attention_heads % t)
        pipelines = tuple(p for p in PIPELINES if p <= arch.num_hidden_layers)
        experts = tuple(e for e in (1, 8, 16, 32, 64) if not arch.n_routed_experts % e) if arch.is_moe else (1,)
    zeros = (stated.zero,) if stated.zero is not None else (1, 3)
    degrees = sorted(product(tensors, pipelines, experts, zeros), key=lambda d: d[0] * d[1])
    for tensor, pipeline, expert, zero in degrees:
        if pipeline > 1 and zero == 3:
            continue
        for virtual, micro, recompute in product(
            _virtual_stages(arch, pipeline, stated),
            (stated.micro_batch,) if stated.micro_batch else MICRO_BATCHES,
            (stated.recompute,) if stated.recompute else RECOMPUTE,
        ):
            schedule = "interleaved" if virtual > 1 else stated.schedule or "1f1b"
            try:
                layout = Layout(
                    devices=devices, tensor=tensor, pipeline=pipeline, context=stated.context or 1, expert=expert,
                    virtual_stages=virtual, schedule=schedule, zero=zero,
                    shard=_shard(stated, devices, tensor, pipeline), recompute=recompute, micro_batch=micro,
                    sequence_parallel=_sequence_parallel(stated),
                )  # fmt: skip
            except ValidationError:
                continue
            if layout.data * micro <= batch:
                yield layout


def best_layout(
    arch: Architecture,
    hardware: Hardware,
    devices: int,
    *,
    batch: int,
    seq_len: int,
    precision: str,
    stated: StatedLayout | None = None,
    calibration: Calibration | None = None,
    must_fit: bool = True,
    **conditions: object,
) -> Choice:
    """The fastest layout that fits; `conditions` are further fields of Workload.

    Raises UserError where none does, saying by how much the leanest exceeds the device. With must_fit False the
    leanest is returned instead: a published run did run.
    """
    calibration = calibration or Calibration()
    capacity = hardware.memory_gb * 1e9 * MEMORY_SHARE
    leanest: tuple[Workload, RankMemory] | None = None
    fitting: list[tuple[float, int, Workload, RankMemory, Rooflines]] = []
    smallest, settled = 0, set()
    for layout in candidate_layouts(arch, hardware, devices, batch, stated or StatedLayout()):
        model_parallel = layout.tensor * layout.pipeline
        without_recompute = layout.model_copy(update={"recompute": "none"})
        if smallest and model_parallel > WORTH_TRYING * smallest or without_recompute in settled:
            continue
        work = Workload(
            arch=arch, hardware=hardware, layout=layout, precision=precision, seq_len=seq_len, global_batch=batch,
            **conditions,  # type: ignore[arg-type]
        )  # fmt: skip
        try:
            memory = rank_memory(
                arch, layout, seq_len=seq_len, micro_batches=int(work.micro_batches), precision=precision, mtp=work.mtp
            )
        except UserError:
            continue  # more stages than layers
        if leanest is None or memory.total < leanest[1].total:
            leanest = (work, memory)
        if memory.total <= capacity:
            smallest = smallest or model_parallel
            settled.add(without_recompute)
            roof = rooflines(work)
            fitting.append((seconds_without_bubble(work, calibration, roof), len(fitting), work, memory, roof))
    if leanest is None:
        raise UserError(f"no layout divides {devices} devices and a batch of {batch} sequences: change one of them")
    if not fitting:
        if must_fit:
            raise UserError(
                f"no layout of {devices} {hardware.title} fits: the leanest, {leanest[0].layout}, needs "
                f"{leanest[1].total / 1e9:.0f} GB of {capacity / 1e9:.0f} GB a device; take more devices or larger ones"
            )
        return Choice(leanest[0].layout, leanest[1], step_time(leanest[0], calibration).seconds)
    best: Choice | None = None
    for bound, _, work, memory, roof in sorted(fitting, key=lambda entry: entry[:2]):
        if best is not None and bound >= best.seconds:  # the bubble is executed only where it can decide
            break
        seconds = step_time(work, calibration, roof).seconds
        if best is None or seconds < best.seconds:
            best = Choice(work.layout, memory, seconds)
    assert best is not None
    return best


def _virtual_stages(arch: Architecture, pipeline: int, stated: StatedLayout) -> tuple[int, ...]:
    if pipeline == 1 or (stated.schedule and stated.schedule != "interleaved"):
        return (1,)
    if stated.virtual_stages:
        return (stated.virtual_stages,)
    layers = -(-arch.num_hidden_layers // pipeline)
    return tuple(v for v in range(1, min(layers, 8) + 1) if not layers % v)


def _shard(stated: StatedLayout, devices: int, tensor: int, pipeline: int) -> int:
    data = devices // (tensor * pipeline * (stated.context or 1))
    return stated.shard if stated.shard and data and not data % stated.shard else 0


def _sequence_parallel(stated: StatedLayout) -> bool:
    """Megatron's papers say SP where they use it; where only full recomputation is said, it is the form before SP."""
    if stated.sequence_parallel is not None:
        return stated.sequence_parallel
    return not (stated.recompute == "full" and stated.zero is None)
