"""The account: what a lab's ledgers say in the end, and the two ways to add to them from outside a run.

The last row of a stage is its account. Amendments (`mark`) hold for the stages that stand before them in the file.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from calendar import monthrange
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from baleen.config import UserError
from baleen.cost.ledger import BEAT_SECONDS, STAGES, Purpose, append_row, check_purpose, lab_of, read_rows, read_run_id
from baleen.cost.money import RateCard

CATEGORIES = ("people", "data", "hardware", "other")
COSTS = "costs.jsonl"


@dataclass(frozen=True)
class StageRecord:
    """The account of one stage. `status`: running, done, failed, interrupted, killed (no end, no recent beat)."""

    run_id: str
    stage_id: str
    project: str
    run: str
    stage: str
    purpose: str
    status: str
    devices: int
    device_name: str
    device_seconds: float
    productive_device_seconds: float
    tokens: int
    joules: float | None
    energy_how: str
    rate: RateCard
    began: datetime
    last: datetime
    parent: str | None = None
    plan: dict[str, float] = field(default_factory=dict)

    @property
    def device_hours(self) -> float:
        return self.device_seconds / 3600

    @property
    def usd(self) -> float:
        return self.device_hours * self.rate.usd_per_device_hour


@dataclass(frozen=True)
class CostRecord:
    """What was recorded beside the compute: `project` None stands for the whole lab."""

    category: str
    usd: float
    begin: date
    end: date
    project: str | None
    note: str


@dataclass(frozen=True)
class Account:
    """Everything a lab recorded. `torn` counts the unreadable lines by file name."""

    stages: tuple[StageRecord, ...]
    costs: tuple[CostRecord, ...]
    torn: dict[str, int]

    @property
    def projects(self) -> list[str]:
        return sorted({s.project for s in self.stages} | {c.project for c in self.costs if c.project is not None})

    def of_project(self, project: str) -> tuple[StageRecord, ...]:
        return tuple(s for s in self.stages if s.project == project)

    def of_run(self, run_id: str) -> tuple[StageRecord, ...]:
        return tuple(s for s in self.stages if s.run_id == run_id)

    def lab_share(self, project: str) -> float:
        """The project's share of the lab-wide costs: that of its compute dollars, or an equal one if there are none."""
        total = sum(s.usd for s in self.stages)
        if total > 0:
            return sum(s.usd for s in self.of_project(project)) / total
        return 1 / len(self.projects)

    def recorded(self, project: str | None = None) -> dict[str, float]:
        """USD by category of `cost add`, of a project with its share of the lab-wide ones, or of the whole lab."""
        out: dict[str, float] = {}
        for cost in self.costs:
            if project is None or cost.project == project:
                share = 1.0
            elif cost.project is None:
                share = self.lab_share(project)
            else:
                continue
            out[cost.category] = out.get(cost.category, 0.0) + cost.usd * share
        return out


def default_lab() -> Path:
    """$BALEEN_LAB, or the folder `runs` here. Raises UserError if there is neither."""
    lab = os.environ.get("BALEEN_LAB")
    if not lab and not Path("runs").is_dir():
        raise UserError("no lab is named and there is no folder 'runs' here: give the lab's folder, or set BALEEN_LAB")
    return Path(lab or "runs")


def lab_of_run(run: Path) -> Path:
    """The lab that knows a run: the parent of its directory, gone or not; of a bare name `default_lab`."""
    return lab_of(run) if len(run.parts) > 1 or run.exists() else default_lab()


def read_ledger(lab: Path | str, now: float | None = None) -> Account:
    """The account of a lab folder. Lines that cannot be read are counted, never fatal.

    `now` (seconds since 1970, default the clock) decides whether a stage without an end is running or was killed.
    Raises UserError if the folder holds no ledger.
    """
    folder = Path(lab) / "ledger"
    if not folder.is_dir():
        raise UserError(f"{lab} holds no folder 'ledger': give the folder that holds the runs, or set BALEEN_LAB")
    now = time.time() if now is None else now
    torn: dict[str, int] = {}
    stages: list[StageRecord] = []
    for path in sorted(folder.glob("*.jsonl")):
        if path.name != COSTS:
            rows, torn[path.name] = read_rows(path)
            found, bad = _stages(path.stem, rows, now)
            torn[path.name] += bad
            stages += found
    costs = []
    rows, torn[COSTS] = read_rows(folder / COSTS)
    for row in rows:
        try:
            costs.append(_cost(row))
        except (KeyError, TypeError, ValueError):
            torn[COSTS] += 1
    stages.sort(key=lambda s: s.began)
    return Account(tuple(stages), tuple(costs), {name: count for name, count in torn.items() if count})


def mark(lab: Path | str, run: str | Path, purpose: Purpose) -> str:
    """Amend the purpose of all stages so far of a run, given by directory, name or id. Returns the run's id.

    A run whose directory is gone is found by its name. Raises UserError if none, or more than one, answers to it.
    """
    check_purpose(purpose)
    amend(lab, run, {"purpose": purpose})
    return find_run(lab, run)


def amend(lab: Path | str, run: str | Path, change: dict[str, Any]) -> None:
    """Append an amendment ({"purpose": ...} or {"plan": {...}}) that holds for all stages so far of a run."""
    row = {"row_id": uuid.uuid4().hex[:12], "event": "amend", "time": datetime.now(UTC).isoformat(), **change}
    _append(Path(lab) / "ledger" / f"{find_run(lab, run)}.jsonl", row)


def find_run(lab: Path | str, run: str | Path) -> str:
    """The id of a run given by directory, by id, or by name."""
    run_id = read_run_id(Path(run))
    folder = Path(lab) / "ledger"
    if run_id is not None and (folder / f"{run_id}.jsonl").is_file():
        return run_id
    name = Path(run).name
    ids = [path.stem for path in sorted(folder.glob("*.jsonl")) if path.name != COSTS]
    if name in ids:
        return name
    matches = [i for i in ids if any(r.get("run") == name for r in read_rows(folder / f"{i}.jsonl")[0])]
    if len(matches) > 1:
        raise UserError(f"{len(matches)} runs were called {name!r}: give one of their ids, {', '.join(matches)}")
    if not matches:
        known = f"known are {', '.join(ids[:8])}" if ids else "no run is recorded there"
        raise UserError(f"the ledger in {folder} knows no run {str(run)!r}: {known}")
    return matches[0]


def add(lab: Path | str, category: str, usd: float, period: str, project: str | None = None, note: str = "") -> None:
    """Record a cost beside the compute: people, data, hardware or other, of a project or (None) of the whole lab.

    Raises UserError on an unknown category, an absurd amount or a bad period.
    """
    if category not in CATEGORIES:
        raise UserError(f"unknown category {category!r}: choose one of {', '.join(CATEGORIES)}")
    if not isfinite(usd) or not 0 <= usd <= 1e12:
        raise UserError(f"a cost of {usd} USD is absurd: give 0 to 1e12")
    if project is not None and not project.strip():
        raise UserError("the project's name is empty: leave --project out for a cost of the whole lab")
    begin, end = parse_period(period)
    row = {
        "row_id": uuid.uuid4().hex[:12],
        "time": datetime.now(UTC).isoformat(),
        "category": category,
        "usd": float(usd),
        "period": [begin.isoformat(), end.isoformat()],
        "project": project,
        "note": note,
    }
    _append(Path(lab) / "ledger" / COSTS, row)


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        append_row(path, row)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): free the disk or give another lab") from None


def parse_period(text: str) -> tuple[date, date]:
    """`A..B` (or `A` alone) of years, months or days -> first and last day. Raises UserError."""
    first, separator, last = text.partition("..")
    try:
        begin, end = _days(first.strip())[0], _days((last if separator else first).strip())[1]
    except ValueError:
        raise UserError(f"period {text!r}: write A..B with dates such as 2026-01-15, 2026-01 or 2026") from None
    if end < begin:
        raise UserError(f"period {text!r} ends before it begins: write the earlier date first")
    if not (begin.year >= 1990 and end.year <= 2100):
        raise UserError(f"period {text!r}: the years must lie between 1990 and 2100")
    return begin, end


def _days(text: str) -> tuple[date, date]:
    match = re.fullmatch(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?", text)
    if not match:
        raise ValueError(text)
    year, month, day = (int(part) if part else None for part in match.groups())
    assert year is not None
    begin = date(year, month or 1, day or 1)
    if day:
        return begin, begin
    return begin, date(year, month or 12, monthrange(year, month or 12)[1])


def _stages(run_id: str, rows: Iterable[dict[str, Any]], now: float) -> tuple[list[StageRecord], int]:
    stages: dict[str, StageRecord] = {}
    marks: dict[str, dict[str, Any]] = {}
    bad = 0
    for row in rows:
        try:
            if row["event"] == "amend":
                change = _amendment(row)
                marks.update({stage_id: {**marks.get(stage_id, {}), **change} for stage_id in stages})
            else:
                record = _record(run_id, row)
                before = stages.get(record.stage_id)
                stages[record.stage_id] = replace(record, began=before.began if before else record.began)
        except (KeyError, TypeError, ValueError, UserError):
            bad += 1
    for stage_id, record in stages.items():
        changes = dict(marks.get(stage_id, {}))
        if record.status == "running" and now - record.last.timestamp() > 3 * BEAT_SECONDS:
            changes["status"] = "killed"
        stages[stage_id] = replace(record, **changes)
    return list(stages.values()), bad


def _amendment(row: dict[str, Any]) -> dict[str, Any]:
    change: dict[str, Any] = {}
    if "purpose" in row:
        check_purpose(row["purpose"])
        change["purpose"] = row["purpose"]
    if "plan" in row:
        change["plan"] = _plan(row["plan"])
    return change


def _plan(plan: Any) -> dict[str, float]:
    return {str(key): _number(value) for key, value in dict(plan).items()}


def _record(run_id: str, row: dict[str, Any]) -> StageRecord:
    if row["stage"] not in STAGES:
        raise ValueError(row["stage"])
    check_purpose(row["purpose"])
    when = datetime.fromisoformat(row["time"])
    if when.tzinfo is None:
        raise ValueError(f"{row['time']} has no time zone")
    return StageRecord(
        run_id=run_id,
        stage_id=str(row["stage_id"]),
        project=str(row["project"]),
        run=str(row["run"]),
        stage=row["stage"],
        purpose=row["purpose"],
        status=str(row["status"]),
        devices=int(_number(row["devices"])),
        device_name=str(row["device_name"]),
        device_seconds=_number(row["device_seconds"]),
        productive_device_seconds=_number(row["productive_device_seconds"]),
        tokens=int(_number(row["tokens"])),
        joules=None if row["joules"] is None else _number(row["joules"]),
        energy_how=str(row["energy_how"]),
        rate=RateCard(**row["rate"]),
        began=when,
        last=when,
        parent=row["parent"],
        plan=_plan(row.get("plan", {})),
    )


def _cost(row: dict[str, Any]) -> CostRecord:
    if row["category"] not in CATEGORIES:
        raise ValueError(row["category"])
    begin, end = (date.fromisoformat(day) for day in row["period"])
    project = None if row["project"] is None else str(row["project"])
    return CostRecord(row["category"], _number(row["usd"]), begin, end, project, str(row.get("note", "")))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ValueError(value)
    return float(value)
