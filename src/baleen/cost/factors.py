"""Tables of factors that ship with the package: data/NAME.toml, in the format of money.toml."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources

from baleen.cost.money import Factor, Factors


@cache
def factor_table(name: str) -> Factors:
    """The factors of data/`name`.toml by their names."""
    text = resources.files("baleen.cost").joinpath(f"data/{name}.toml").read_text(encoding="utf-8")
    return {key: Factor(**fields) for key, fields in tomllib.loads(text).items()}
