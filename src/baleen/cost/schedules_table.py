"""Pipeline schedules executed side by side: bubble, activations and parameters, with their Gantt charts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baleen.config import UserError
from baleen.cost.figures import share
from baleen.cost.gantt import gantt_svg, gantt_text
from baleen.cost.schedule import SCHEDULES, Order, schedule
from baleen.cost.simulator import Durations, Timeline, execute

if TYPE_CHECKING:
    from rich.console import Group


MOST_OPERATIONS = 100_000  # ranks times micro-batches: beyond, more of them change no bubble


def run_schedules(name: str, ranks: int, microbatches: int, durations: Durations) -> dict[str, Timeline]:
    """The timeline of one schedule, or of `all`, by name. Raises UserError for counts a named one cannot run.

    `durations` are those of a rank's share of the network; a schedule that cuts the network finer gets shorter stages.
    """
    if not any((durations.forward, durations.backward)):
        raise UserError("a step in which nothing takes time has no bubble: give --forward or --backward some seconds")
    if ranks * microbatches > MOST_OPERATIONS:
        raise UserError(
            f"{microbatches:,} micro-batches on {ranks:,} ranks would run for hours and show nothing new: take at most "
            f"{max(1, MOST_OPERATIONS // ranks):,}"
        )
    if name != "all":
        return {name.lower(): _run(schedule(name, ranks, microbatches), durations)}
    timelines = {}
    for each in SCHEDULES:
        try:
            timelines[each] = _run(schedule(each, ranks, microbatches), durations)
        except UserError:  # a schedule that cannot run these counts stays out of the comparison; its table says so
            continue
    if not timelines:
        raise UserError(f"no schedule runs {microbatches} micro-batches on {ranks} ranks: take at least 1 of each")
    return timelines


def _run(order: Order, whole: Durations) -> Timeline:
    cut = _cut(order)
    parts = [value / cut for value in (whole.forward, whole.backward, whole.weight)]  # type: ignore[operator]
    return execute(order, Durations(*parts, overlap=whole.overlap, latency=whole.latency))


def _order(timeline: Timeline) -> Order:
    return [[span.action for span in rank] for rank in timeline.spans]


def _cut(order: Order) -> float:
    """Stages of the network over ranks."""
    return (1 + max(op.stage for rank in order for action in rank for op in action)) / len(order)


def schedules_dict(timelines: dict[str, Timeline]) -> dict[str, Any]:
    """{schedules: {name: {seconds, bubble_share, ...}}, left_out}; lists are by rank.

    An activation is what a rank's share of the network keeps of one micro-batch.
    """
    return {
        "schedules": {
            name: {
                "seconds": t.seconds,
                "bubble_seconds": t.bubble_seconds,
                "bubble_share": max(t.bubble_seconds) / t.seconds,
                "peak_activations": [peak / _cut(_order(t)) for peak in t.peak_activations],
                "stages_held": t.stages_held,
            }
            for name, t in timelines.items()
        },
        "left_out": [name for name in SCHEDULES if len(timelines) > 1 and name not in timelines],
    }


def schedules_view(timelines: dict[str, Timeline]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="A step of the pipeline")
    for name in ("schedule", "seconds", "bubble", "activations held", "stages held"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    charts = []
    for name, t in timelines.items():
        bubble = share(max(t.bubble_seconds) / t.seconds)
        peak = max(t.peak_activations) / _cut(_order(t))
        table.add_row(name, f"{t.seconds:.4g}", bubble, f"{peak:g}", str(max(t.stages_held)))
        charts.append(Text(f"\n{name}\n{gantt_text(t)}", no_wrap=True, overflow="crop"))
    left_out = schedules_dict(timelines)["left_out"]
    notes = [Text(f"cannot run these counts: {', '.join(left_out)}")] if left_out else []
    return Group(table, *notes, *charts)


def schedule_svg(timelines: dict[str, Timeline]) -> str:
    """The chart of a single schedule. Raises UserError if there are several."""
    if len(timelines) != 1:
        raise UserError("--svg draws one schedule: name it with --schedule")
    return gantt_svg(next(iter(timelines.values())))
