"""Dollars: the factors with their sources, and the rate card that prices a device-hour."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

from baleen.config import UserError


@dataclass(frozen=True)
class Factor:
    """One number of the account: a value, the interval it may lie in, and who says so."""

    value: float
    unit: str
    source: str
    date: str
    low: float | None = None
    high: float | None = None
    recalled: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise UserError(f"a factor of {self.value} {self.unit} is not a finite number")

    @property
    def interval(self) -> tuple[float, float]:
        return (self.value if self.low is None else self.low, self.value if self.high is None else self.high)


@dataclass(frozen=True)
class RateCard:
    """What one device-hour costs and draws, written into every ledger row so that it can be judged later.

    `watts_per_device` is an average draw under load, used only where energy cannot be measured; None: unknown.
    """

    usd_per_device_hour: float
    what: str
    source: str
    watts_per_device: float | None = None
    watts_source: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.usd_per_device_hour <= 1e4:
            raise UserError(
                f"a rate of {self.usd_per_device_hour} USD per device-hour is absurd: give a number from 0 to 10,000"
            )
        if self.watts_per_device is not None and not 0 <= self.watts_per_device <= 1e5:
            raise UserError(f"a draw of {self.watts_per_device} W per device is absurd: give 0 to 100,000 W")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def _table(name: str) -> Mapping[str, Factor]:
    raw = tomllib.loads(resources.files("baleen.cost").joinpath(f"data/{name}.toml").read_text(encoding="utf-8"))
    return {key: Factor(**fields) for key, fields in raw.items()}


def load_factors(overrides: Iterable[str] = (), table: str = "money") -> dict[str, Factor]:
    """The factors of data/`table`.toml by name; each override is `name=number`.

    Raises UserError on an unknown factor (naming the nearest) or a value that is no number, or negative.
    """
    factors = dict(_table(table))
    for override in overrides:
        name, value = parse_override(override)
        if name not in factors:
            near = get_close_matches(name, factors, n=1, cutoff=0.0)[0]
            raise UserError(f"--set {override}: no factor {name!r}; did you mean {near!r}?")
        factors[name] = replace(factors[name], value=value, low=None, high=None, source="set by hand", recalled=False)
    return factors


def parse_override(override: str) -> tuple[str, float]:
    """`name=number` -> (name, number). Raises UserError if it is not that, or negative."""
    name, separator, text = override.partition("=")
    try:
        value = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = math.nan
    if not separator or not math.isfinite(value) or value < 0:
        raise UserError(f"--set {override}: write name=number with a number that is not negative")
    return name.strip(), value


def rate_card(device_name: str, usd_per_device_hour: float = 0.0) -> RateCard:
    """The rate of a device by name; of "cpu", one device is one vCPU. `usd_per_device_hour` > 0 replaces the table's.

    Raises UserError for a device that is in no table and has no price given.
    """
    factors = load_factors()
    if device_name.lower() == "cpu":
        usd, watts = factors["cpu_usd_per_hour"], factors["cpu_watts"]
        card = RateCard(
            usd.value, "rental of one vCPU", f"{usd.source} ({usd.date})", watts.value, f"{watts.source} ({watts.date})"
        )
    elif usd_per_device_hour > 0:
        card = RateCard(usd_per_device_hour, f"one {device_name}", "given by the user")
    else:
        raise UserError(f"no price is known for {device_name!r}: set cost.usd_per_device_hour")
    if usd_per_device_hour > 0:
        card = replace(card, usd_per_device_hour=usd_per_device_hour, source="given by the user")
    return card
