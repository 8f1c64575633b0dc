"""Factors: numbers of the account with their sources and intervals, and how far a result moves with them.

They stand in data/NAME.toml, one table a factor.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources

from baleen.config import UserError
from baleen.cost.quantities import plain_number


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
    assumed: bool = False

    def __post_init__(self) -> None:
        assert math.isfinite(self.value) and self.source and self.date, self

    @property
    def citation(self) -> str:
        marks = [mark for mark in ("recalled", "assumed") if getattr(self, mark)]
        return f"{self.source} ({', '.join([self.date, *marks])})"

    @property
    def interval(self) -> tuple[float, float]:
        return (self.value if self.low is None else self.low, self.value if self.high is None else self.high)


Factors = Mapping[str, Factor]


@cache
def factor_table(name: str) -> Factors:
    """The factors of data/`name`.toml by their names."""
    text = resources.files("baleen.cost").joinpath(f"data/{name}.toml").read_text(encoding="utf-8")
    return {key: Factor(**fields) for key, fields in tomllib.loads(text).items()}


def override_factors(factors: Factors, overrides: Iterable[str]) -> Factors:
    """`factors` with each `name=number` put in as an exact figure. Raises UserError as `load_factors`."""
    changed = dict(factors)
    for override in overrides:
        name, separator, text = (part.strip() for part in override.partition("="))
        if separator and name not in changed:
            near = get_close_matches(name, changed, n=1, cutoff=0.0)[0]
            raise UserError(f"--set {override}: no factor {name!r}; did you mean {near!r}?")
        try:
            value = float(plain_number(text))
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise UserError(
                f"--set {override}: write name=number, with a number that is not negative, decimals behind a point"
            )
        changed[name] = replace(changed[name], value=value, low=None, high=None, source="set by hand", recalled=False)
    return changed


def spread(
    compute: Callable[[Factors], float], factors: Factors
) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """How far a result may lie from its middle: (low, high, the swing of each factor alone).

    Each factor goes to its two bounds with the others at their values; the swings down and up are then combined as
    independent errors (root of the sum of squares).
    """
    middle = compute(factors)
    swings: dict[str, tuple[float, float]] = {}
    for name, factor in factors.items():
        ends = [compute({**factors, name: replace(factor, value=end)}) for end in factor.interval]
        if ends != [middle, middle]:
            swings[name] = (min(*ends, middle), max(*ends, middle))
    down = math.sqrt(sum((middle - low) ** 2 for low, _ in swings.values()))
    up = math.sqrt(sum((high - middle) ** 2 for _, high in swings.values()))
    return middle - down, middle + up, swings
