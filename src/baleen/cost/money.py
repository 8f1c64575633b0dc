"""Dollars: the rate card of a device-hour, renting against owning, people, research.

Renting and owning are two answers to one question (what did this hour cost?) and are never added up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from baleen.config import UserError
from baleen.cost.factors import Factors, factor_table, override_factors

if TYPE_CHECKING:
    from baleen.cost.hardware import Hardware

HOURS_PER_YEAR = 8760.0
OWNING_LEAVES_OUT = (
    "staff who run it",
    "spares and repairs",
    "storage",
    "taxes",
    "delivery and installation",
)


def load_factors(overrides: Iterable[str] = (), acting: Collection[str] | None = None) -> Factors:
    """The factors of data/money.toml; each override is `name=number`. `acting`: those that move the result (None: all).

    Raises UserError on a factor that is unknown (naming the nearest) or does not act, or a value that is no number or
    negative.
    """
    overrides, factors = list(overrides), factor_table("money")
    for override in overrides:
        name = override.partition("=")[0].strip()
        if acting is not None and name in factors and name not in acting:
            raise UserError(f"--set {override}: {name} changes nothing here; what does is {', '.join(acting)}")
    return override_factors(factors, overrides)


OWNING = (
    "server_overhead", "network_share", "amortisation_years", "depreciation_per_year", "cost_of_capital",
    "server_power_overhead", "draw_share", "pue", "electricity_usd_per_kwh", "colocation_usd_per_kw_month",
    "utilisation",
)  # fmt: skip


@dataclass(frozen=True)
class Ownership:
    """What an owned device costs per hour of work, USD, part by part."""

    capital: float
    colocation: float
    electricity: float
    idle: float

    @property
    def usd_per_hour(self) -> float:
        return self.capital + self.colocation + self.electricity + self.idle


def ownership(device_usd: float, device_watts: float, factors: Factors) -> Ownership:
    """Cost of owning one device of a cluster.

    Capital is the annuity of the price less the present value of what is left at the end. Power is paid twice, as
    rated kW to the colocation and as kWh drawn; an hour without work still costs capital and colocation.
    """
    f = {name: factor.value for name, factor in factors.items()}
    if not 0 < f["utilisation"] <= 1 or f["amortisation_years"] <= 0:
        raise UserError("utilisation must lie between 0 and 1 and amortisation_years above 0")
    if f["network_share"] >= 1 or f["depreciation_per_year"] > 1:
        raise UserError("network_share and depreciation_per_year are shares below 1")
    price = device_usd * f["server_overhead"] / (1 - f["network_share"])
    years, rate = f["amortisation_years"], f["cost_of_capital"]
    left = price * (1 - f["depreciation_per_year"]) ** years / (1 + rate) ** years
    annuity = 1 / years if rate == 0 else rate / (1 - (1 + rate) ** -years)
    capital = (price - left) * annuity / HOURS_PER_YEAR
    kilowatts = device_watts / 1e3 * f["server_power_overhead"]
    colocation = kilowatts * f["colocation_usd_per_kw_month"] * 12 / HOURS_PER_YEAR
    electricity = kilowatts * f["draw_share"] * f["pue"] * f["electricity_usd_per_kwh"]
    idle = (capital + colocation) * (1 / f["utilisation"] - 1)
    return Ownership(capital, colocation, electricity, idle)


def people_usd(people: float, years: float, factors: Factors) -> float:
    """Staff cost of `people` full-time equivalents over `years`."""
    return people * years * factors["people_usd_per_year"].value


def whole_project_usd(final_usd: float, factors: Factors) -> tuple[float, float, float]:
    """(low, middle, high) of a project's compute, from that of its final runs alone."""
    factor = factors["research_multiplier"]
    return final_usd * factor.interval[0], final_usd * factor.value, final_usd * factor.interval[1]


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


def rate_card(device_name: str, usd_per_device_hour: float = 0.0, overrides: Iterable[str] = ()) -> RateCard:
    """The rate of a device: "cpu" (one device is one vCPU), a name of the hardware table, or one a driver reports.

    The price is `usd_per_device_hour` if above 0, else the middle of the rental prices, else the cost of owning.
    Raises UserError for a device that is in no table and has no price given.
    """
    factors = load_factors(overrides)
    if device_name.lower() == "cpu":
        usd, watts = factors["cpu_usd_per_hour"], factors["cpu_watts"]
        card = RateCard(
            usd.value, "rental of one vCPU", f"{usd.source} ({usd.date})", watts.value, f"{watts.source} ({watts.date})"
        )
    else:
        card = _accelerator_card(device_name, usd_per_device_hour, factors)
    if usd_per_device_hour == 0:
        return card
    return replace(card, usd_per_device_hour=usd_per_device_hour, what=f"one {device_name}", source="given by the user")


def _accelerator_card(name: str, usd: float, factors: Factors) -> RateCard:
    device = recognise(name)
    if device is None:
        if usd == 0:
            raise UserError(f"no price is known for {name!r}: set cost.usd_per_device_hour, or --usd-per-device-hour")
        return RateCard(usd, f"one {name}", "given by the user")
    draw = factors["draw_share"]
    watts = None if device.watts is None else device.watts * draw.value
    watts_source = "" if watts is None else f"{device.watts:g} W rated x {draw.value:g} ({draw.source})"
    if device.rental_usd_per_hour:
        low, high, when = device.rental_usd_per_hour
        what = f"rental of one {device.title}, middle of {low:g} to {high:g} USD ({when})"
        return RateCard((low + high) / 2, what, device.sources["rental_usd_per_hour"], watts, watts_source)
    if device.purchase_usd and device.watts:
        price = sum(device.purchase_usd) / 2
        what = f"owning one {device.title} bought at {price:,.0f} USD"
        owned = ownership(price, device.watts, factors).usd_per_hour
        return RateCard(owned, what, device.sources["purchase_usd"], watts, watts_source)
    if usd == 0:
        raise UserError(f"the hardware table has no price for {device.title}: set cost.usd_per_device_hour")
    return RateCard(usd, f"one {device.title}", "given by the user", watts, watts_source)


def recognise(name: str) -> Hardware | None:
    """The device of the hardware table that a name such as "NVIDIA A100-SXM4-80GB" stands for, or None."""
    from baleen.cost.hardware import find_hardware, shipped_hardware

    try:
        return find_hardware(name)
    except UserError:
        words = re.findall(r"[a-z0-9]+", name.lower())
    best: tuple[float, str] | None = None
    for key, device in shipped_hardware().items():
        family, *parts = key.split("-")
        if family in words or any(alias in words for alias in device.aliases):
            fits = sum(any(word.startswith(part) for word in words) for part in parts)
            score = (fits - (len(parts) - fits) / 2, key)
            best = score if best is None else max(best, score)
    return shipped_hardware()[best[1]] if best else None
