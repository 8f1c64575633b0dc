"""A step by the phases its pipeline schedule runs through, beside a published table of the same phases."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from baleen.cost.bubble import order_of, whole
from baleen.cost.calibration import Calibration
from baleen.cost.communication import exposed_seconds
from baleen.cost.simulator import Durations, execute
from baleen.cost.step import StepTime, kernel_seconds, operation_seconds, rooflines
from baleen.cost.workload import Workload

# Phases of the schedule under the names of arXiv 2505.09343, table 4.
PHASES = {"F": "1F", "bubble": "bubble", "B": "1B", "I": "1B", "W": "1W", "F&B": "1F1B"}


def schedule_phases(work: Workload, calibration: Calibration, step: StepTime) -> dict[str, float]:
    """Seconds of a step that the average rank spends in 1F, 1B, 1W, 1F1B (overlapped pairs), bubble and optimizer.

    All micro-batches of the step are executed. Uneven experts and stages lengthen operations; what is lost to jitter
    is lost in waiting for the slower ranks, in the bubble; the exchange of gradients and weights belongs to the
    optimizer's phase. The phases sum to the step.
    """
    roof = rooflines(work)
    kernels = kernel_seconds(roof, work, calibration)
    compute = work.micro_batches * sum(kernels.busy) + roof.optimizer
    exposed = exposed_seconds(roof.traffic, work, calibration, compute)
    forward, backward, weight = whole(operations := operation_seconds(roof, work, kernels, exposed))
    order = order_of(work.layout, round(work.micro_batches))
    stages = 1 + max(op.stage for rank in order for action in rank for op in action)
    share = work.layout.pipeline / stages
    durations = Durations(share * forward, share * backward, share * min(weight, backward), operations.overlap)
    timeline = execute(order, durations)
    ranks = len(timeline.spans)
    stretch = 1 + step.phases["imbalance"] / (sum(timeline.busy_seconds) / ranks)
    phases = dict.fromkeys([*PHASES.values(), "optimizer"], 0.0)
    for rank in range(ranks):
        for kind, seconds in timeline.seconds_by_kind(rank).items():
            if kind != "bubble":
                phases[PHASES[kind]] += stretch * seconds / ranks
    phases["optimizer"] = roof.optimizer + exposed["data"]
    phases["bubble"] = step.seconds - sum(phases.values())
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
