"""Layouts worth trying for a run: all that divide and keep what is stated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from pydantic import ValidationError

from baleen.cost.architecture import Architecture
from baleen.cost.hardware import Hardware
from baleen.cost.layout import Layout, Recompute, StatedLayout

PIPELINES = (1, 2, 4, 8, 16, 32, 64)
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE: tuple[Recompute, ...] = ("none", "deepseek", "operators", "full")


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
