"""Every factor of a plan by name, wherever it is kept, so that a critic can change one: `--set name=value`."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from baleen.config import UserError
from baleen.cost.calibration import CONSTANTS, Calibration, shipped_calibration
from baleen.cost.factors import Factors, factor_table, override_factors
from baleen.cost.failures import Reliability, load_reliability
from baleen.cost.hardware import Hardware
from baleen.cost.money import load_factors
from baleen.cost.quantities import plain_number

DRAW_SHARE = "draw_share"  # of money.toml: average over rated watts
NOT_NUMBERS = {"name", "title", "generation", "aliases", "sources", "purchase_usd", "rental_usd_per_hour"}

# Factors that no part of a plan depends on, and the command whose results they move.
NOT_OF_A_PLAN = {
    "people_usd_per_year": "project", "grid_kg_co2_per_kwh": "report",
    "spare_share": "simulate failures", "repair_hours": "simulate failures",
    "eager": "validate", "untuned": "validate", "untuned_hopper": "validate", "vendor": "validate",
}  # fmt: skip


class Assumptions(NamedTuple):
    """What a plan stands on: the device, slow-downs of the chain, money, failures, serving."""

    hardware: Hardware
    calibration: Calibration
    money: Factors
    reliability: Reliability
    serving: Factors


def load_assumptions(hardware: Hardware, sets: Iterable[str] = ()) -> Assumptions:
    """The shipped factors with each `name=number` put in; a name in several tables changes in all of them.

    Raises UserError on an unknown name (naming the nearest) or a value that is no number.
    """
    tables = {
        "hardware": set(Hardware.model_fields) - NOT_NUMBERS,
        "calibration": set(CONSTANTS),
        "money": set(load_factors()),
        "reliability": set(factor_table("reliability")),
        "serving": set(factor_table("serving")),
    }
    chosen: dict[str, list[str]] = {table: [] for table in tables}
    for text in sets:
        name = text.partition("=")[0].strip()
        if name in NOT_OF_A_PLAN:
            raise UserError(f"--set {text}: {name} moves `baleen cost {NOT_OF_A_PLAN[name]}`, not a plan")
        homes = [table for table, names in tables.items() if name in names]
        if not homes:
            known = sorted(set().union(*tables.values()))
            near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"--set {text}: no factor {name!r}; did you mean {near!r}?")
        for table in homes:
            chosen[table].append(text)
    return Assumptions(
        set_hardware(hardware, chosen["hardware"]),
        Calibration({**shipped_calibration(), **_numbers(chosen["calibration"])}),
        load_factors(chosen["money"]),
        load_reliability(chosen["reliability"]),
        override_factors(factor_table("serving"), chosen["serving"]),
    )


def split_sets(sets: Iterable[str]) -> tuple[list[str], dict[str, float], list[str]]:
    """`name=number` of cells of devices, as they are; constants of the calibration by name; draw_share, as it is.

    These are the factors of a step, a run, its memory and the energy of its devices. Raises UserError on other names.
    """
    cells, constants = set(Hardware.model_fields) - NOT_NUMBERS, []
    of_devices, draws = [], []
    for text in sets:
        name = text.partition("=")[0].strip()
        if name not in {*cells, *CONSTANTS, DRAW_SHARE}:
            near = get_close_matches(name, sorted({*cells, *CONSTANTS, DRAW_SHARE}), n=1, cutoff=0.0)[0]
            raise UserError(f"--set {text}: no constant or cell of a device {name!r}; did you mean {near!r}?")
        (draws if name == DRAW_SHARE else of_devices if name in cells else constants).append(text)
    numbers = _numbers(constants)
    Calibration(numbers)  # raises UserError where one is not positive
    return of_devices, numbers, draws


def set_hardware(hardware: Hardware, sets: list[str]) -> Hardware:
    """A device with some of its cells changed by hand. Raises UserError where that makes no device."""
    if not sets:
        return hardware
    changed: dict[str, Any] = {**hardware.model_dump(), **_numbers(sets)}
    changed["sources"] = {**hardware.sources, **dict.fromkeys(_numbers(sets), "set by hand")}
    try:
        return Hardware.model_validate(changed)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--set {first['loc'][0]}: {first['msg']}") from None


def _numbers(sets: list[str]) -> dict[str, float]:
    numbers = {}
    for text in sets:
        name, _, value = text.partition("=")
        try:
            numbers[name.strip()] = float(plain_number(value))
        except ValueError:
            raise UserError(f"--set {text}: write name=number, decimals behind a point") from None
    return numbers
