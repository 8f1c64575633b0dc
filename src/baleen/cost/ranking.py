"""The fastest of many ways to run a step: those that fit into memory, ranked by the time their chain predicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from baleen.config import UserError
from baleen.cost.calibration import Calibration
from baleen.cost.layout import Layout, Recompute
from baleen.cost.memory import RankMemory, rank_memory
from baleen.cost.step import StepTime, least_seconds, rooflines, step_time
from baleen.cost.workload import Workload

RISING_RECOMPUTATION: tuple[Recompute, ...] = ("none", "selective", "modules", "deepseek", "operators", "full")
# More model parallelism than fits already only adds traffic and bubbles; this much more is still tried.
WORTH_TRYING = 16


class Candidate(NamedTuple):
    work: Workload
    memory: RankMemory
    step: StepTime

    @property
    def layout(self) -> Layout:
        return self.work.layout


class Found(NamedTuple):
    """The fastest that fit, best first; the leanest of all tried; and how many those were."""

    best: list[Candidate]
    leanest: Candidate | None
    tried: int


def rank(works: Iterable[Workload], calibration: Calibration, top: int = 1) -> Found:
    """The `top` fastest workloads that fit. One that fits is not tried again with more recomputation.

    The bubble needs an executed schedule, so what cannot come among the `top` even with the least wait that its
    schedule allows is not executed.
    """
    leanest: tuple[float, Workload, RankMemory] | None = None
    fitting = []
    tried, smallest, settled = 0, 0, set()
    for work in sorted(works, key=_effort):
        memory = memory_of(work)
        if memory is None:
            continue
        tried += 1
        model_parallel, plain = _effort(work)[0], work.layout.model_copy(update={"recompute": "none"})
        if leanest is None or memory.total < leanest[0]:
            leanest = (memory.total, work, memory)
        if memory.total > work.hardware.fillable_bytes or plain in settled:
            continue
        smallest = smallest or model_parallel
        if model_parallel > WORTH_TRYING * smallest:
            continue
        settled.add(plain)
        roof = rooflines(work)
        fitting.append((least_seconds(work, calibration, roof), tried, work, memory, roof))
    best: list[Candidate] = []
    for bound, _, work, memory, roof in sorted(fitting, key=lambda entry: entry[:2]):
        if len(best) < top or bound < best[-1].step.seconds:
            best.append(Candidate(work, memory, step_time(work, calibration, roof)))
            best = sorted(best, key=lambda candidate: candidate.step.seconds)[:top]
    least = leanest and Candidate(leanest[1], leanest[2], step_time(leanest[1], calibration))
    return Found(best, least, tried)


def memory_of(work: Workload) -> RankMemory | None:
    """Of the fullest rank; None for a layout with more stages than layers."""
    try:
        return rank_memory(
            work.arch, work.layout, seq_len=work.seq_len, micro_batches=int(work.micro_batches),
            precision=work.storage, mtp=work.mtp, process_bytes=work.hardware.process_gb * 1e9,
        )  # fmt: skip
    except UserError:
        return None


def _effort(work: Workload) -> tuple[int, int]:
    layout = work.layout
    return layout.tensor * layout.pipeline, RISING_RECOMPUTATION.index(layout.recompute)
