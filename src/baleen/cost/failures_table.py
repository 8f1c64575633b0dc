"""A simulated run with its failures, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baleen.cost.figures import quantity, share

if TYPE_CHECKING:
    from rich.table import Table


def failures_view(report: dict[str, Any]) -> Table:
    """The dict of `failures_report` as a table."""
    from rich.table import Table

    days = report["days"]
    table = Table(title=f"{quantity(report['gpus'])} devices, {days['work']:.1f} days of work", show_header=False)
    table.add_row("mean time between failures", f"{report['mtbf_hours']:.1f} h")
    table.add_row("failures", str(report["failures"]))
    interval, best = report["checkpoint_interval_seconds"], report["young_daly_seconds"]
    table.add_row("a checkpoint every", f"{interval / 60:.1f} min (best, after Young and Daly: {best / 60:.1f})")
    table.add_row("took", f"{days['wall']:.2f} days")
    for name in ("checkpoints", "lost", "restarts", "waiting"):
        table.add_row(f"of it {name}", f"{days[name]:.2f} days, {share(days[name] / days['wall'])}")
    table.add_row("goodput, simulated", share(report["goodput"]))
    table.add_row("goodput, in closed form", share(report["expected_goodput"]))
    return table
