"""What a pipeline does to a step: waiting and overlap, read from the executed schedule, and stages of unequal size."""

from __future__ import annotations

import math
from functools import cache

from baleen.cost.layout import Layout
from baleen.cost.schedule import Order, interleaved_1f1b, schedule
from baleen.cost.simulator import Durations, execute


def order_of(layout: Layout, micro_batches: int) -> Order:
    """The order in which the ranks of a layout run. Raises UserError for counts that its schedule cannot run."""
    return _order(layout.schedule, layout.pipeline, layout.virtual_stages, micro_batches)


def bubble_seconds(layout: Layout, micro_batches: float, durations: Durations) -> float:
    """Seconds of a step in which the average rank waits, from the executed schedule.

    durations: one micro-batch on one rank, the same for all. Once the pipe is full, more micro-batches do not change
    the bubble, so no more than two rounds are executed; times are rounded to a fifth of a forward.
    """
    if layout.pipeline == 1:
        return 0.0
    forward, backward, weight = whole(durations)
    split = layout.schedule not in ("1f1b", "interleaved")  # only then does it matter what part of B is for the weights
    unit, _ = _executed(
        *(layout.schedule, layout.pipeline, layout.virtual_stages),
        max(1, math.ceil(micro_batches)),
        round(5 * backward / forward) / 5,
        round(weight / forward, 1) if split else 0.0,
        round(durations.overlap, 2) if layout.overlaps else 1.0,
    )
    return unit * forward


def busy_seconds(layout: Layout, micro_batches: float, durations: Durations) -> float:
    """Seconds of a step in which the average rank works: every operation alone, less what overlapped pairs save."""
    forward, backward, _ = whole(durations)
    alone = micro_batches * (forward + backward)
    if not layout.overlaps:
        return alone
    rounds = max(1, math.ceil(micro_batches))
    _, single = _executed(layout.schedule, layout.pipeline, layout.virtual_stages, rounds, 2.0, 1.0, 1.0)
    return alone - max(0.0, micro_batches - single) * (1 - durations.overlap) * (forward + backward)


def least_wait(layout: Layout, forward: float, backward: float) -> float:
    """Seconds for which the mean rank must wait in any case: for the first micro-batch to reach it and, where nothing
    is put off to the end, for the last one's gradient to leave through the ranks before it."""
    ranks = layout.pipeline
    distance = [min(r, ranks - 1 - r) if layout.schedule == "dualpipe" else r for r in range(ranks)]
    passing = forward + (backward if layout.schedule in ("1f1b", "interleaved") else 0.0)
    return sum(distance) / layout.chunks * passing


@cache
def _executed(
    name: str, ranks: int, virtual: int, micro_batches: int, backward: float, weight: float, overlap: float
) -> tuple[float, float]:
    """Of the mean rank: its bubble in forwards of one micro-batch, and the micro-batches that it runs unpaired."""
    rounds = min(micro_batches, 2 * ranks)
    if name == "interleaved":
        rounds = math.ceil(rounds / ranks) * ranks
    elif name in ("dualpipe", "dualpipev"):
        rounds = max(2 * ranks, rounds + rounds % 2)
    order = _order(name, ranks, virtual, rounds)
    stages = 1 + max(op.stage for rank in order for action in rank for op in action)
    share = ranks / stages  # of a rank's forward that one stage takes
    timeline = execute(order, Durations(share, share * backward, share * min(weight, backward), overlap))
    pairs = sum(len(action) > 1 for rank in order for action in rank)
    return sum(timeline.bubble_seconds) / ranks, rounds - share * pairs / ranks


def _order(name: str, ranks: int, virtual: int, micro_batches: int) -> Order:
    if name == "interleaved":
        return interleaved_1f1b(ranks, micro_batches, virtual)
    return schedule(name, ranks, micro_batches)


def whole(durations: Durations) -> tuple[float, float, float]:
    forward, backward, weight = durations.forward, durations.backward, durations.weight
    assert isinstance(forward, float) and isinstance(backward, float) and isinstance(weight, float)
    return forward, backward, weight


def stage_imbalance(layout: Layout, layers: float, ends_in_layers: float) -> float:
    """Fullest model chunk over the mean when whole layers, head and loss are spread over the pipeline's chunks."""
    if layout.pipeline == 1:
        return 1.0
    chunks = layout.chunks
    units = layers + ends_in_layers
    mean = units / chunks
    # The chunk with the head may hold no layer; the others share the layers as evenly as whole layers allow.
    others = math.ceil((layers - max(0.0, mean - ends_in_layers)) / max(1, chunks - 1) - 1e-9)
    return max(1.0, min(others, math.ceil(layers / chunks)) / mean, min(ends_in_layers, mean + 1) / mean)
