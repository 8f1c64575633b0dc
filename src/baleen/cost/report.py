"""The lab's report: all projects of a ledger by stage and purpose, plans against what was measured, energy and CO2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baleen.cost import figures
from baleen.cost.account import CATEGORIES, Account, StageRecord, read_ledger
from baleen.cost.card import (
    NOT_RECORDED,
    TRAINING,
    counted_twice,
    energy,
    failed,
    full_leaves_out,
    productive_share,
)
from baleen.cost.factors import Factors
from baleen.cost.figures import mass, quantity, share, signed_share, usd
from baleen.cost.ledger import PURPOSES, STAGES
from baleen.cost.money import load_factors

if TYPE_CHECKING:
    from rich.console import Group

JOULES_PER_KWH = 3.6e6
SPENT_COLUMNS = ("by", "", "dollars", "device-hours", "stages")
PLANNED = ("usd", "device_hours", "joules")


def lab_report(lab: Path | str, overrides: Iterable[str] = (), now: float | None = None) -> dict[str, Any]:
    """What `baleen cost report --json` prints. USD, device-hours, J, kWh, kg; `overrides` are `factor=number`.

    The headline of a project is its runs marked final; where none is, the last that trained and is no ablation or
    failure.
    Raises UserError if the folder holds no ledger.
    """
    factors = load_factors(overrides, ("facility_overhead", "grid_kg_co2_per_kwh"))
    account = read_ledger(lab, now)
    projects = [project_report(account, name, factors) for name in account.projects]
    compute = sum(s.usd for s in account.stages)
    recorded = account.recorded()
    full = compute + sum(recorded.values())
    headline = sum(p["headline_usd"] for p in projects)
    return {
        "lab": str(lab),
        "headline_usd": headline,
        "full_usd": full,
        "ratio": full / headline if headline > 0 else None,
        "compute_usd": compute,
        "recorded": {name: recorded.get(name, NOT_RECORDED) for name in CATEGORIES},
        "costs": [asdict(c) | {"begin": c.begin.isoformat(), "end": c.end.isoformat()} for c in account.costs],
        "device_hours": sum(s.device_hours for s in account.stages),
        "productive_share": productive_share([s for s in account.stages if s.stage in TRAINING]),
        **footprint(account.stages, factors),
        "projects": projects,
        "stages": _by(account.stages, "stage", STAGES),
        "purposes": _by(account.stages, "purpose", PURPOSES),
        "statuses": _by(account.stages, "status", ("done", "running", "interrupted", "failed", "killed")),
        "failed_usd": sum(s.usd for s in account.stages if failed(s)),
        "plans": plans(account),
        "rates": sorted({(s.device_name, s.rate.usd_per_device_hour, s.rate.what) for s in account.stages}),
        "headline_leaves_out": [
            "runs that are not final, failures, data, tokenizer, evaluation, serving; people, data and hardware bought"
        ],
        "full_leaves_out": full_leaves_out(account.stages, recorded),
        "torn_lines": account.torn,
        "set": list(overrides),
    }


def project_report(account: Account, project: str, factors: Factors) -> dict[str, Any]:
    stages = account.of_project(project)
    final = final_runs(stages)
    training = [s for s in stages if s.run_id in final and s.stage in TRAINING]
    recorded = account.recorded(project)
    headline = sum(s.usd for s in training)
    full = sum(s.usd for s in stages) + sum(recorded.values())
    return {
        "project": project,
        "headline_runs": sorted(final),
        "runs": len({s.run_id for s in stages}),
        "headline_usd": headline,
        "full_usd": full,
        "ratio": full / headline if headline > 0 else None,
        "recorded": recorded,
        "device_hours": sum(s.device_hours for s in stages),
        "stages": _by(stages, "stage", STAGES),
        "purposes": _by(stages, "purpose", PURPOSES),
        **footprint(stages, factors),
    }


def final_runs(stages: Sequence[StageRecord]) -> set[str]:
    """Ids of the runs whose training is the headline."""
    training = [s for s in stages if s.stage in TRAINING]
    marked = {s.run_id for s in training if s.purpose == "final"}
    tries = [s.run_id for s in training if s.purpose == "research"]
    return marked or set(tries[-1:])


def footprint(stages: Sequence[StageRecord], factors: Factors) -> dict[str, Any]:
    """Energy of the devices, of the building they stand in, and CO2; its interval is both factors at their bounds."""
    joules, how = energy(stages)
    grid = factors["grid_kg_co2_per_kwh"]
    out: dict[str, Any] = dict.fromkeys(("facility_kwh", "co2_kg", "co2_kg_low", "co2_kg_high"))
    out |= {"joules": joules, "energy_how": how}
    out |= {"grid_kg_co2_per_kwh": grid.value, "grid_source": f"{grid.source} ({grid.date})"}
    if joules is not None:
        kwh = joules / JOULES_PER_KWH
        building = factors["facility_overhead"]
        out["facility_kwh"] = kwh * building.value
        out["co2_kg"] = kwh * building.value * grid.value
        out["co2_kg_low"], out["co2_kg_high"] = (
            kwh * a * b for a, b in zip(building.interval, grid.interval, strict=True)
        )
    return out


def plans(account: Account) -> list[dict[str, Any]]:
    """One row for each figure of a plan that stands in the ledger: planned, measured so far, error."""
    rows = []
    for run_id in dict.fromkeys(s.run_id for s in account.stages):
        training = [s for s in account.of_run(run_id) if s.stage in TRAINING]
        plan = next((s.plan for s in reversed(training) if s.plan), {})
        measured = {
            "usd": sum(s.usd for s in training),
            "device_hours": sum(s.device_hours for s in training),
            "joules": energy(training)[0],
        }
        for name in PLANNED:
            planned, found = plan.get(name), measured[name]
            if planned and found is not None:
                error = found / planned - 1
                rows.append(
                    {"run_id": run_id, "figure": name, "planned": planned, "measured": found, "relative_error": error}
                )
    return rows


def _by(stages: Sequence[StageRecord], key: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    out = {}
    for name in names:
        found = [s for s in stages if getattr(s, key) == name]
        if found:
            out[name] = {
                "usd": sum(s.usd for s in found),
                "device_hours": sum(s.device_hours for s in found),
                "count": len(found),
            }
    return out


def report_tables(report: dict[str, Any]) -> Group:
    """The report for a terminal."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    projects = Table(title=escape(f"What the lab {report['lab']} spent"))
    for column in ("project", "runs", "headline", "full", "ratio", "device-hours", "energy"):
        projects.add_column(column, justify="left" if column == "project" else "right")
    for p in report["projects"]:
        projects.add_row(
            escape(p["project"]),
            str(p["runs"]),
            usd(p["headline_usd"]),
            usd(p["full_usd"]),
            ratio_text(p["ratio"]),
            quantity(p["device_hours"]),
            "unknown" if p["joules"] is None else figures.energy(p["joules"]),
        )
    parts = Table(title="Where it went")
    for column in SPENT_COLUMNS:
        parts.add_column(column, justify="left" if column in ("by", "") else "right")
    for row in spent_rows(report):
        parts.add_row(*map(escape, row))
    tables: list[Any] = [projects, parts]
    if report["plans"]:
        planned = Table(title="Plan against measured")
        for column in ("run", "figure", "planned", "measured so far", "error"):
            planned.add_column(column, justify="left" if column in ("run", "figure") else "right")
        for row in report["plans"]:
            cells = (quantity(row["planned"]), quantity(row["measured"]), signed_share(row["relative_error"]))
            planned.add_row(row["run_id"], row["figure"], *cells)
        tables.append(planned)
    return Group(*tables, *map(Text, report_sentences(report)))


def spent_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was spent by stage, purpose and end of the stages, and what was recorded beside it, under SPENT_COLUMNS:
    each category's sum, and below it each cost with its period."""
    rows = [
        (title, name, usd(entry["usd"]), quantity(entry["device_hours"]), str(entry["count"]))
        for title, key in (("stage", "stages"), ("purpose", "purposes"), ("end", "statuses"))
        for name, entry in report[key].items()
    ]
    for name, value in report["recorded"].items():
        rows.append(("recorded", name, value if isinstance(value, str) else usd(value), "", ""))
        for cost in report["costs"]:
            if cost["category"] == name:
                of = f"{cost['begin']}..{cost['end']}, {cost['project'] or 'the whole lab'}"
                rows.append(("", f"{of}: {cost['note']}" if cost["note"] else of, usd(cost["usd"]), "", ""))
    return rows


def report_sentences(report: dict[str, Any]) -> list[str]:
    """The report in plain words, one statement each."""
    lines = [
        f"Headline (final runs alone): {usd(report['headline_usd'])}. Full: {usd(report['full_usd'])}"
        + (f", {report['ratio']:.1f} times as much." if report["ratio"] is not None else "."),
        f"Failed or killed: {usd(report['failed_usd'])}.",
    ]
    if report["productive_share"] is not None:
        lines.append(f"Of the training hours, {share(report['productive_share'])} went into steps that counted.")
    if report["joules"] is not None:
        lines.append(
            f"Energy: {figures.energy(report['joules'])} at the devices ({report['energy_how']}), "
            f"{figures.energy(report['facility_kwh'] * JOULES_PER_KWH)} with the building; CO2 "
            f"{mass(report['co2_kg'])} ({mass(report['co2_kg_low'])} to {mass(report['co2_kg_high'])}) at "
            f"{report['grid_kg_co2_per_kwh']:g} kg per kWh: {report['grid_source']}."
        )
    lines += [f"The headline leaves out {text}." for text in report["headline_leaves_out"]]
    lines.append("The full price leaves out " + "; ".join(report["full_leaves_out"]) + ".")
    lines += counted_twice(report["recorded"])
    if report["torn_lines"]:
        count = sum(report["torn_lines"].values())
        lines.append(f"Skipped {count} unreadable ledger lines, in {', '.join(report['torn_lines'])}.")
    return lines


def ratio_text(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"
