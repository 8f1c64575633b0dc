"""A step by the phases its pipeline schedule runs through, beside a published table of the same phases."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from baleen.cost.calibration import Calibration
from baleen.cost.schedule import Order, interleaved_1f1b, schedule
from baleen.cost.simulator import Durations, execute
from baleen.cost.step import StepTime, Workload, busy, kernel_seconds, rooflines

# Phases of the schedule under the names of arXiv 2505.09343, table 4.
PHASES = {"F": "1F", "bubble": "bubble", "B": "1B", "I": "1B", "W": "1W", "F&B": "1F1B"}


def schedule_phases(work: Workload, calibration: Calibration, step: StepTime) -> dict[str, float]:
    """Seconds of a step that the average rank spends in 1F, 1B, 1W, 1F1B (overlapped pairs), bubble and optimizer.

    All micro-batches of the step are executed; what the chain adds besides (imbalance, jitter, exposed communication)
    lengthens every phase alike, so that the phases sum to the step.
    """
    roof = rooflines(work)
    kernels = kernel_seconds(roof, work, calibration)
    forward, backward = busy(kernels)
    order = _order(work)
    stages = 1 + max(op.stage for rank in order for action in rank for op in action)
    share = work.layout.pipeline / stages
    timeline = execute(
        order, Durations(share * forward, share * backward, share * min(kernels.weight_gradient, backward))
    )
    stretch = (step.seconds - roof.optimizer) / timeline.seconds / len(timeline.spans)
    phases = dict.fromkeys([*PHASES.values(), "optimizer"], 0.0)
    for rank in range(len(timeline.spans)):
        for kind, seconds in timeline.seconds_by_kind(rank).items():
            phases[PHASES[kind]] += stretch * seconds
    phases["optimizer"] = roof.optimizer
    return phases


def published_step(model: str, gpu: str, work: Workload) -> dict[str, Any] | None:
    """{seconds, phases, source} of a step that was published for this very model, batch and number of devices."""
    for entry in _published():
        if (entry["model"], entry["gpu"]) == (model, gpu) and (entry["gpus"], entry["batch"], entry["seq_len"]) == (
            work.layout.devices,
            work.global_batch,
            work.seq_len,
        ):
            return {"seconds": entry["seconds"], "phases": entry["phases"], "source": entry["source"]}
    return None


@cache
def _published() -> list[dict[str, Any]]:
    text = resources.files("baleen.cost").joinpath("data/published_steps.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["step"]


def _order(work: Workload) -> Order:
    layout, count = work.layout, round(work.micro_batches)
    if layout.schedule == "interleaved":
        return interleaved_1f1b(layout.pipeline, count, layout.virtual_stages)
    return schedule(layout.schedule, layout.pipeline, count)
