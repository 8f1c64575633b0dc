"""What the hours of a plan cost: renting the final run, the compute of the whole project, owning the devices."""

from __future__ import annotations

from typing import Any, NamedTuple

from baleen.config import UserError
from baleen.cost.assumptions import Assumptions
from baleen.cost.money import ownership, whole_project_usd

HEADLINE_LEAVES_OUT = (
    "research, ablations and failed runs", "data", "people", "context extension and post-training", "evaluation",
    "hours that are rented and not used",
)  # fmt: skip
FULL_LEAVES_OUT = ("data", "people", "serving")


class Prices(NamedTuple):
    """USD per device-hour, and MWh of the building per device-hour (None where the device's watts are not known)."""

    low: float
    mid: float
    high: float
    source: str
    mwh: float | None


def device_prices(facts: Assumptions, usd_per_hour: float | None) -> Prices:
    """Rental from the table, or the user's; energy from rated watts, their usual draw and the building's overhead."""
    hardware, f = facts.hardware, facts.money
    mwh = None
    if hardware.watts:
        mwh = hardware.watts / 1e6 * f["draw_share"].value * f["facility_overhead"].value
    elif hardware.threads:
        mwh = hardware.threads * f["cpu_watts"].value / 1e6 * f["facility_overhead"].value
    if usd_per_hour is not None:
        if not 0 < usd_per_hour <= 1e4:
            raise UserError(f"--usd-per-hour {usd_per_hour:g} is absurd: give a number above 0, up to 10,000")
        return Prices(usd_per_hour, usd_per_hour, usd_per_hour, "given by the user", mwh)
    if hardware.rental_usd_per_hour:
        low, high, when = hardware.rental_usd_per_hour
        return Prices(low, (low + high) / 2, high, f"rental, {hardware.sources['rental_usd_per_hour']}, {when}", mwh)
    if hardware.purchase_usd and hardware.watts:
        low, mid, high = (
            ownership(price, hardware.watts, f).usd_per_hour
            for price in (hardware.purchase_usd[0], sum(hardware.purchase_usd) / 2, hardware.purchase_usd[1])
        )
        return Prices(low, mid, high, f"owning, {hardware.sources['purchase_usd']}; no rental price is known", mwh)
    if hardware.threads:
        vcpu = f["cpu_usd_per_hour"]
        low, mid, high = (hardware.threads * usd for usd in (vcpu.interval[0], vcpu.value, vcpu.interval[1]))
        return Prices(low, mid, high, f"rental of {hardware.threads} vCPU: {vcpu.citation}", mwh)
    raise UserError(f"the hardware table has no price for {hardware.title}: give one with --usd-per-hour")


def plan_money(facts: Assumptions, prices: Prices, hours: float, hours_as_runs_went: float) -> dict[str, Any]:
    """Headline (renting the final run) and full price (the whole project's compute), and what owning would cost.

    The interval of the headline: cheapest rental with the goodput planned, dearest with that of published runs.
    """
    usd = {"low": hours * prices.low, "mid": hours * prices.mid, "high": hours_as_runs_went * prices.high}
    full = dict(zip(("low", "mid", "high"), whole_project_usd(usd["mid"], facts.money), strict=True))
    hardware = facts.hardware
    owned = None
    if hardware.purchase_usd and hardware.watts:
        owned = hours * ownership(sum(hardware.purchase_usd) / 2, hardware.watts, facts.money).usd_per_hour
    multiplier = facts.money["research_multiplier"]
    return {
        "usd": usd,
        "usd_per_gpu_hour": {"low": prices.low, "mid": prices.mid, "high": prices.high, "source": prices.source},
        "headline": {"usd": usd["mid"], "what": "renting the final run", "leaves_out": list(HEADLINE_LEAVES_OUT)},
        "full": {
            "usd": full,
            "what": f"compute of the whole project, {multiplier.value:g} times the final run: {multiplier.source}",
            "leaves_out": list(FULL_LEAVES_OUT),
        },
        "owned_usd": owned,
    }
