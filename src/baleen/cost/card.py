"""The cost card of a run: its headline price (the final run alone) beside the full one (all that the project took)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baleen.config import UserError
from baleen.cost import figures
from baleen.cost.account import CATEGORIES, Account, StageRecord, find_run, lab_of_run, read_ledger
from baleen.cost.figures import quantity, share, usd
from baleen.cost.ledger import PURPOSES, STAGES

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

TRAINING = ("pretrain", "extend", "sft", "rl", "distill")
NOT_RECORDED = "not recorded"
IN_DATA = "in data"


def cost_card(run_dir: Path | str, lab: Path | str | None = None, now: float | None = None) -> dict[str, Any]:
    """What a run cost, for `baleen cost card`, the report page and the model card. USD, hours, joules.

    `headline_usd` is this run's training stages; `full_usd` every stage of every run of its project, failures, data,
    tokenizer, evaluation and serving included, and what `baleen cost add` recorded. A run whose directory is gone is
    found by name. Raises UserError if the lab's ledger does not know the run.
    """
    lab = Path(lab) if lab else lab_of_run(Path(run_dir))
    run_id = find_run(lab, run_dir)
    account = read_ledger(lab, now)
    return card_of(account, run_id)


def card_of(account: Account, run_id: str) -> dict[str, Any]:
    own = account.of_run(run_id)
    if not own:
        raise UserError(f"the ledger of {run_id} holds no readable stage: look into ledger/{run_id}.jsonl")
    project = own[-1].project
    training = [s for s in own if s.stage in TRAINING]
    whole = account.of_project(project)
    recorded = account.recorded(project)
    headline, compute = sum(s.usd for s in training), sum(s.usd for s in whole)
    full = compute + sum(recorded.values())
    joules, energy_how = energy(training)
    full_joules, full_energy_how = energy(whole)
    rates = _distinct(s.rate.to_dict() for s in reversed(training or own))
    return {
        "run": own[-1].run,
        "run_id": run_id,
        "project": project,
        "headline_usd": headline,
        "full_usd": full,
        "ratio": full / headline if headline > 0 else None,
        "device_hours": sum(s.device_hours for s in training),
        "full_device_hours": sum(s.device_hours for s in whole),
        "device_name": " and ".join(_distinct(s.device_name for s in training or own)),
        "productive_share": productive_share(training),
        "tokens": sum(s.tokens for s in training),
        "joules": joules,
        "energy_how": energy_how,
        "full_joules": full_joules,
        "full_energy_how": full_energy_how,
        "rate_card": rates[0],
        "earlier_rate_cards": rates[1:],
        "runs": len({s.run_id for s in whole}),
        "failed_usd": sum(s.usd for s in whole if failed(s)),
        "stages": _by_stage(whole),
        "purposes": {name: _sum_or_none(s.usd for s in whole if s.purpose == name) for name in PURPOSES},
        "recorded": {name: recorded.get(name, NOT_RECORDED) for name in CATEGORIES},
        "headline_leaves_out": headline_leaves_out(compute - headline, recorded),
        "full_leaves_out": full_leaves_out(whole, recorded),
        "torn_lines": sum(account.torn.values()),
    }


def failed(stage: StageRecord) -> bool:
    return stage.purpose == "failed" or stage.status in ("failed", "killed")


def energy(stages: Sequence[StageRecord]) -> tuple[float | None, str]:
    """(J, how known). None if no stage knows; where only some do, the text says so."""
    known = [s for s in stages if s.joules is not None]
    if not known:
        return None, "unknown"
    how = " and ".join(sorted({s.energy_how for s in known}))
    missing = len(stages) - len(known)
    return sum(s.joules or 0.0 for s in known), how + (f"; unknown for {missing} stages" if missing else "")


def productive_share(stages: Sequence[StageRecord]) -> float | None:
    """Device-seconds of steps that counted over those allocated (goodput)."""
    allocated = sum(s.device_seconds for s in stages)
    return sum(s.productive_device_seconds for s in stages) / allocated if allocated > 0 else None


def headline_leaves_out(other_compute: float, recorded: dict[str, float]) -> list[str]:
    """What the headline price of a run is silent about, with the sums where they are known."""
    other = (
        f"other compute of the project: tries, failures, data, tokenizer, evaluation, serving ({usd(other_compute)})"
    )
    sums = {name: usd(recorded[name]) if name in recorded else NOT_RECORDED for name in CATEGORIES}
    return [other, *(f"{name} ({text})" for name, text in sums.items() if name != "other" or name in recorded)]


def full_leaves_out(stages: Sequence[StageRecord], recorded: dict[str, float]) -> list[str]:
    """What even the full price is silent about."""
    parts = [f"{name}: {NOT_RECORDED}" for name in CATEGORIES if name not in recorded]
    parts.append(
        "work done before the ledger began or outside it, and what others paid (open data, open weights, papers)"
    )
    if any(s.status == "killed" for s in stages):
        parts.append("up to one heartbeat of each stage that was killed")
    return parts


def counted_twice(recorded: Mapping[str, float | str]) -> list[str]:
    """A warning where machines may be in the full price as bought and by the hour."""
    if isinstance(recorded["hardware"], str):
        return []
    return [
        "Hardware was recorded as bought, and device-hours are priced beside it: if their rate pays for the same "
        "machines, the full price counts them twice."
    ]


def card_rows(card: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, final run alone, whole project) as text."""
    return [
        ("dollars", usd(card["headline_usd"]), usd(card["full_usd"])),
        (f"device-hours ({card['device_name']})", quantity(card["device_hours"]), quantity(card["full_device_hours"])),
        (
            "energy",
            _energy_text(card["joules"], card["energy_how"]),
            _energy_text(card["full_joules"], card["full_energy_how"]),
        ),
        ("runs", "1", str(card["runs"])),
        ("failed or killed", "", usd(card["failed_usd"])),
        *((name, "", value if isinstance(value, str) else usd(value)) for name, value in card["recorded"].items()),
    ]


def card_view(card: dict[str, Any]) -> Group:
    """Table and notes for a terminal."""
    from rich.console import Group
    from rich.text import Text

    return Group(card_table(card), Text(card_notes(card)))


def card_table(card: dict[str, Any]) -> Table:
    """The figures alone, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"What {card['run']} cost (project {card['project']})"))
    table.add_column()
    table.add_column("headline: final run alone", justify="right")
    table.add_column("full: whole project", justify="right")
    for row in card_rows(card):
        table.add_row(*map(escape, row))
    return table


def card_notes(card: dict[str, Any]) -> str:
    rate = card["rate_card"]
    lines = [
        f"rate: {usd(rate['usd_per_device_hour'])} a device-hour, {rate['what']}; {rate['source']}",
        "the headline leaves out " + "; ".join(card["headline_leaves_out"]),
        "the full price leaves out " + "; ".join(card["full_leaves_out"]),
        *counted_twice(card["recorded"]),
    ]
    if card["torn_lines"]:
        lines.append(f"{card['torn_lines']} torn lines of the ledger were skipped")
    return "\n".join(lines)


def card_paragraph(card: dict[str, Any]) -> str:
    """One plain paragraph for a model card."""
    rates = " and ".join(
        f"{usd(rate['usd_per_device_hour'])} a device-hour ({rate['what']})"
        for rate in (card["rate_card"], *card["earlier_rate_cards"])
    )
    goodput = card["productive_share"]
    missing = [name for name, value in card["recorded"].items() if value == NOT_RECORDED]
    text = (
        f"The final run took {quantity(card['device_hours'])} device-hours ({card['device_name']}) and cost "
        f"{usd(card['headline_usd'])} at {rates}. "
        f"The whole project, with its {card['runs']} runs, failures, data, evaluation and serving, has cost "
        f"{usd(card['full_usd'])} so far"
    )
    if card["ratio"] is not None:
        text += f", {card['ratio']:.1f} times as much"
    text += f". Energy of the final run: {_energy_text(card['joules'], card['energy_how'])}. "
    if goodput:
        text += f"{share(goodput)} of the hours went into steps that counted. "
    if missing:
        text += f"Not recorded, and so in neither price: {', '.join(missing)}."
    return text.rstrip()


def _by_stage(stages: Sequence[StageRecord]) -> dict[str, float | str]:
    """A tokenizer without a stage of its own was trained while the data were prepared."""
    sums = {name: _sum_or_none(s.usd for s in stages if s.stage == name) for name in STAGES}
    if sums["tokenizer"] == NOT_RECORDED != sums["data"]:
        sums["tokenizer"] = IN_DATA
    return sums


def _energy_text(joules: float | None, how: str) -> str:
    return "unknown" if joules is None else f"{figures.energy(joules)} ({how})"


def _sum_or_none(values: Iterable[float]) -> float | str:
    found = list(values)
    return sum(found) if found else NOT_RECORDED


def _distinct(items: Iterable[Any]) -> list[Any]:
    return list({json.dumps(item, sort_keys=True): item for item in items}.values())
