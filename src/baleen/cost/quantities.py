"""Quantities as people write them: 14.8T tokens, $1M, 30d, 500MWh."""

from __future__ import annotations

import math
import re

from baleen.config import UserError

SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
MEGAWATT_HOURS = {"kwh": 1e-3, "mwh": 1.0, "gwh": 1e3, "twh": 1e6}


def parse_count(text: str, what: str) -> float:
    """ "14.8T", "300B", "2,048", "1e12" -> a number above 0. Raises UserError naming `what`."""
    return _parse(text, what, SCALES, "such as 2048, 300B or 14.8T")


def parse_dollars(text: str, what: str) -> float:
    """ "$1M", "250k", "5.6e6" -> USD. Raises UserError naming `what`."""
    return _parse(text.strip().removeprefix("$").lower().removesuffix("usd"), what, SCALES, "such as 1M or 250k")


def parse_seconds(text: str, what: str) -> float:
    """ "30d", "12h", "90min", "2w" -> seconds; the unit must be there. Raises UserError naming `what`."""
    return _parse(text, what, SECONDS, "with its unit, such as 30d, 12h or 2w")


def parse_megawatt_hours(text: str, what: str) -> float:
    """ "500MWh", "1.2GWh" -> MWh; the unit must be there. Raises UserError naming `what`."""
    return _parse(text, what, MEGAWATT_HOURS, "with its unit, such as 500MWh or 1.2GWh")


def plain_number(text: str) -> str:
    """ "2,048" or "1_000" -> without separators. Raises ValueError where a comma does not part thousands ("14,8")."""
    if "," in text and not re.fullmatch(r"\s*[-+]?\d{1,3}(,\d{3})+(\.\d+)?\s*", text):
        raise ValueError(f"the comma in {text!r} parts no thousands: write the decimals behind a point")
    return text.replace(",", "").replace("_", "")


def _parse(text: str, what: str, units: dict[str, float], example: str) -> float:
    match = re.fullmatch(r"([-+]?[\d_,]*\.?\d+(?:e[-+]?\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = match[2] if match else None
    if match is None or unit not in units:
        raise UserError(f"{what} {text!r} is no quantity: write a number {example}")
    try:
        value = float(plain_number(match[1])) * units[unit]
    except ValueError as error:
        raise UserError(f"{what} {text!r}: {error}") from None
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{what} {text!r} must be above 0 and finite: write a number {example}")
    return value
