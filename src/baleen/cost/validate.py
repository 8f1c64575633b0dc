"""Predictions against published runs: errors by kind beside a baseline, and the fit of the calibration constants.

Fitting is least squares on logarithms with the constants' priors as a ridge and Huber weights against outliers.
Rows marked `anchor` are never fitted on; rows that are fitted on are predicted without their own source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from baleen.config import UserError
from baleen.cost.assumptions import DRAW_SHARE, set_hardware, split_sets
from baleen.cost.calibration import CONSTANTS, Calibration, Fitted, fit_to_toml, shipped_fit
from baleen.cost.cases import Case, Prepared, implied_mfu, prepare, read_cases, shipped_cases
from baleen.cost.hardware import Hardware, find_hardware
from baleen.cost.memory import GIB
from baleen.cost.money import load_factors
from baleen.cost.step import Rooflines, rooflines, step_time

NEVER_FITTED = "anchor"
# Spread of a row about the truth (standard deviation of the logarithm): hours also hold what nobody published.
STEP_NOISE, RUN_NOISE = 0.10, 0.25
TIER_NOISE = {"A": 1.0, "B": 1.5, "C": 2.5}
HUBER = 1.5  # beyond so many deviations a row pulls no harder


class Item(NamedTuple):
    """A prepared case with its rooflines, ready to be predicted under many calibrations."""

    row: Prepared
    roof: Rooflines

    @property
    def published(self) -> float:
        """Seconds a token and GPU, from the rate or from the hours."""
        row = self.row
        if row.rate:
            return 1 / row.rate
        assert row.hours and row.tokens
        return row.hours * 3600 / row.tokens

    @property
    def noise(self) -> float:
        base = RUN_NOISE if self.row.goodput_counts else STEP_NOISE
        return base * TIER_NOISE.get(self.row.case.text["tier"], 2.5)


def predicted(item: Item, calibration: Calibration) -> float:
    """Seconds a token and GPU: of a step, or of a run with its goodput."""
    row = item.row
    step = step_time(row.work, calibration, item.roof).seconds
    seconds = step * row.work.layout.devices / row.work.tokens
    if "NVIDIA" in row.case.text["source"]:
        seconds *= calibration["vendor"]
    if row.untuned:
        seconds *= calibration["untuned"]
        if row.work.hardware.generation == "hopper":
            seconds *= calibration["untuned_hopper"]
    if row.goodput_counts:
        seconds /= calibration["goodput"]
    return seconds


def fit(items: Sequence[Item], start: Calibration | None = None) -> Calibration:
    """Constants that explain the items best, held near their priors; plain numpy, Gauss-Newton on the logarithms."""
    names = list(CONSTANTS)
    prior = np.log([CONSTANTS[name].prior for name in names])
    weight_of_prior = np.array([1 / CONSTANTS[name].sigma for name in names])
    theta = np.log([(start or Calibration())[name] for name in names])
    noise = np.array([item.noise for item in items])

    def residuals(theta: np.ndarray) -> np.ndarray:
        calibration = Calibration(dict(zip(names, np.exp(theta).tolist(), strict=True)))
        return np.array([math.log(predicted(item, calibration) / item.published) for item in items]) / noise

    for _ in range(6):
        r = residuals(theta)
        step = 1e-3
        jacobian = np.stack([(residuals(theta + step * unit) - r) / step for unit in np.eye(len(names))], axis=1)
        huber = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(r), 1e-9)))[:, None]
        left = np.vstack([jacobian * huber, np.diag(weight_of_prior)])
        right = np.concatenate([-r * huber[:, 0], weight_of_prior * (prior - theta)])
        change = np.linalg.lstsq(left, right, rcond=None)[0]
        theta = theta + np.clip(change, -0.5, 0.5)
        if np.abs(change).max() < 1e-4:
            break
    return Calibration(dict(zip(names, np.exp(theta).tolist(), strict=True)))


def leave_one_source_out(items: Sequence[Item]) -> dict[str, Calibration]:
    """For each source the constants fitted without it."""
    start = fit(items)
    sources = sorted({item.row.case.source for item in items})
    return {source: fit([i for i in items if i.row.case.source != source], start) for source in sources}


def baseline_mfu(row: Prepared, known: Iterable[Item], leave_out: bool = True) -> float | None:
    """Median MFU of rows with the same GPU generation, type and precision; wider groups where there are none.

    With `leave_out` the row's own source is not among them.
    """
    others = [o for o in known if not leave_out or o.row.case.source != row.case.source]

    def key(row: Prepared) -> tuple[str, bool, str]:
        return row.work.hardware.generation, row.work.arch.is_moe, row.work.precision

    for width in (3, 2, 1, 0):
        same = [o for o in others if key(o.row)[:width] == key(row)[:width]]
        if same:
            return median(implied_mfu(1 / o.published, o.row.work) for o in same)
    return None


def validate(
    cases_csv: Path | None = None,
    calibrate_on: str | None = None,
    hardware_files: Sequence[Path] = (),
    sets: Sequence[str] = (),
) -> dict[str, Any]:
    """Predicts every row of a file (default: the one that ships) and compares; plain values for JSON.

    Without `calibrate_on` the shipped constants predict, and rows that those were fitted on are predicted by constants
    fitted without their source. With it, constants are fitted on the file's rows of that split, again leaving a row's
    own source out. `sets` are `name=number` of constants, of cells of all devices, or draw_share. Returns {kinds,
    splits, rows, skipped, constants}; errors are relative: of tokens/s/GPU (step), GPU-hours (run), GiB (memory) and
    MWh (energy).
    Raises UserError for a broken file or a split that is absent or never fitted on.
    """
    cases = shipped_cases() if cases_csv is None else read_cases(cases_csv)
    cells, changed, draws = split_sets(sets)
    draw_share = load_factors(draws)[DRAW_SHARE].value

    def find(name: str) -> Hardware:
        return set_hardware(find_hardware(name, *hardware_files), cells)

    prepared, skipped = _prepare_all(cases, find)
    items = [Item(row, rooflines(row.work)) for row in prepared if row.rate or row.hours]
    fitted_for = _constants(items, calibrate_on)

    def constants_for(row: Prepared | None) -> Calibration:
        return fitted_for(row).with_(**changed)

    known = [i for i in items if i.row.case.text["split"] == calibrate_on] if calibrate_on else _shipped_items(items)
    rows: list[dict[str, Any]] = []
    for row in prepared:
        constants = constants_for(row)
        in_split = [i for i in items if i.row.case.text["split"] == row.case.text["split"]]
        rows += _compare(row, constants, known, in_split, draw_share)
    splits = sorted({row["split"] for row in rows})
    return {
        "kinds": _summary(rows),
        "splits": {split: _summary([row for row in rows if row["split"] == split]) for split in splits},
        "rows": rows,
        "skipped": skipped,
        "constants": dict(constants_for(None)),
    }


def write_fit(path: Path, date: str) -> Fitted:
    """Fits the constants on the shipped rows marked `cal` and writes them with their fit."""
    prepared, _ = _prepare_all(shipped_cases(), find_hardware)
    items = [Item(row, rooflines(row.work)) for row in prepared if row.rate or row.hours]
    cal = [item for item in items if item.row.case.text["split"] == "cal"]
    left_out = leave_one_source_out(cal)
    draw_share = load_factors()[DRAW_SHARE].value
    compared = [r for i in cal for r in _compare(i.row, left_out[i.row.case.source], cal, cal, draw_share)]
    rows = [r for r in compared if r["kind"] in ("step", "run")]
    errors = {
        kind: {k: round(v, 4) for k, v in s.items() if v is not None} for kind, s in _summary(rows).items() if s["n"]
    }
    fitted = Fitted(fit(cal), left_out, tuple(item.row.case.id for item in cal), errors)
    path.write_text(fit_to_toml(fitted, date), encoding="utf-8")
    return fitted


def render(result: dict[str, Any]) -> str:
    """`validate`'s result as text: errors by kind and split, then row by row."""
    lines = ["mean absolute relative error (baseline: median MFU per GPU generation, type and precision)", ""]
    lines.append(f"{'split':<10}{'kind':<8}{'n':>4}{'model':>9}{'baseline':>10}")
    for split, kinds in [*result["splits"].items(), ("all", result["kinds"])]:
        for kind, s in kinds.items():
            if s["n"]:
                base = f"{s['baseline_mape']:>10.1%}" if s["baseline_mape"] is not None else f"{'-':>10}"
                lines.append(f"{split:<10}{kind:<8}{s['n']:>4}{s['mape']:>9.1%}{base}")
    lines += ["", f"{'row':<42}{'kind':<8}{'published':>12}{'predicted':>12}{'error':>8}  layout"]
    for row in result["rows"]:
        lines.append(
            f"{row['id']:<42}{row['kind']:<8}{row['published']:>12.4g}{row['predicted']:>12.4g}"
            f"{row['relative_error']:>+8.1%}  {row['layout']}"
        )
    lines += [f"skipped {s['id']}: {s['reason']}" for s in result["skipped"]]
    return "\n".join(lines)


def _prepare_all(cases: Sequence[Case], find: Callable[[str], Hardware]) -> tuple[list[Prepared], list[dict[str, str]]]:
    """Cases as workloads, laid out under the constants' priors so that layouts never depend on a fit."""
    prepared, skipped = [], []
    for case in cases:
        if case.kind is None and not case.numbers["mem_gib"]:
            skipped.append({"id": case.id, "reason": f"metric {case.text['metric']!r} is not predicted"})
            continue
        try:
            row = prepare(case, Calibration(), find)
        except UserError as error:
            skipped.append({"id": case.id, "reason": str(error)})
            continue
        if row.rate or row.hours or row.gib or row.mwh:
            prepared.append(row)
        else:
            skipped.append({"id": case.id, "reason": "it states no speed, hours with tokens, memory or energy"})
    return prepared, skipped


def _constants(items: Sequence[Item], calibrate_on: str | None) -> Callable[[Prepared | None], Calibration]:
    """Constants for a row: never fitted on its own source. None asks for those of all sources."""
    if calibrate_on is None:
        fitted = shipped_fit()
        rows = set(fitted.rows)
        return lambda row: (
            fitted.without_source[row.case.source] if row is not None and row.case.id in rows else fitted.constants
        )
    if calibrate_on == NEVER_FITTED:
        raise UserError(f"rows marked {NEVER_FITTED} are compared and never fitted on: calibrate on another split")
    chosen = [item for item in items if item.row.case.text["split"] == calibrate_on]
    if not chosen:
        splits = sorted({item.row.case.text["split"] for item in items})
        raise UserError(f"no row of split {calibrate_on!r} can be fitted on; the file's splits are {', '.join(splits)}")
    everything, left_out = fit(chosen), leave_one_source_out(chosen)
    return lambda row: everything if row is None else left_out.get(row.case.source, everything)


def _shipped_items(items: Sequence[Item]) -> Sequence[Item]:
    """Rows whose MFU the baseline may know: those the shipped constants were fitted on."""
    rows = set(shipped_fit().rows)
    here = [item for item in items if item.row.case.id in rows]
    return here if len(here) == len(rows) else _fitted_items()


@cache
def _fitted_items() -> tuple[Item, ...]:
    """The shipped rows that the shipped constants were fitted on."""
    rows = set(shipped_fit().rows)
    prepared, _ = _prepare_all([case for case in shipped_cases() if case.id in rows], find_hardware)
    return tuple(Item(row, rooflines(row.work)) for row in prepared)


def _compare(
    row: Prepared, constants: Calibration, known: Sequence[Item], in_split: Sequence[Item], draw_share: float
) -> list[dict[str, Any]]:
    """One entry for each thing that a row states."""
    item = Item(row, rooflines(row.work))
    seconds, hardware = predicted(item, constants), row.work.hardware
    hours = seconds * row.tokens / 3600 if row.tokens else None
    share, inside = baseline_mfu(row, known), baseline_mfu(row, in_split, leave_out=False)
    out = []
    for kind, published, value in (
        ("step", row.rate, 1 / seconds),
        ("run", row.hours, hours),
        ("memory", row.gib, row.memory.total * hardware.allocated_over_used / GIB),
        ("energy", row.mwh, hours * hardware.watts * draw_share / 1e6 if hours and hardware.watts else None),
    ):
        if published is None or value is None:
            continue
        error, baseline, baseline_in_split = value / published - 1, None, None
        if kind in ("step", "run"):
            mfu = implied_mfu(1 / item.published, row.work)
            baseline = _error_of_mfu(share, mfu, kind)
            baseline_in_split = _error_of_mfu(inside, mfu, kind)
        out.append(
            {
                "id": row.case.id,
                "split": row.case.text["split"],
                "kind": kind,
                "published": published,
                "predicted": value,
                "relative_error": error,
                "baseline_relative_error": baseline,
                "baseline_in_split_relative_error": baseline_in_split,
                "layout": f"{row.work.layout} micro-batch {row.work.layout.micro_batch}",
                "layout_published": row.stated.states_degrees,
                "source": row.case.text["source"],
            }
        )
    return out


def _error_of_mfu(guess: float | None, mfu: float, kind: str) -> float | None:
    """Error of tokens/s (step) or of hours (run) if `guess` is taken for the MFU."""
    if guess is None:
        return None
    return guess / mfu - 1 if kind == "step" else mfu / guess - 1


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean absolute errors by kind: the model's, the baseline's from other sources, and its own in the same split.

    The last knows each row's own figure, which no prediction does.
    """

    def mean(values: list[float | None]) -> float | None:
        known = [abs(value) for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return {
        kind: {
            "n": len(here),
            "mape": mean([row["relative_error"] for row in here]),
            "baseline_mape": mean([row["baseline_relative_error"] for row in here]),
            "baseline_in_split_mape": mean([row["baseline_in_split_relative_error"] for row in here]),
        }
        for kind in ("step", "run", "memory", "energy")
        for here in [[row for row in rows if row["kind"] == kind]]
    }
