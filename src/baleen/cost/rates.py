"""What an hour of a device costs: renting beside owning (never added up), and how far each factor moves the latter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from baleen.config import UserError
from baleen.cost.factors import Factors, spread
from baleen.cost.figures import usd
from baleen.cost.hardware import find_hardware
from baleen.cost.money import OWNING, OWNING_LEAVES_OUT, load_factors, ownership, rate_card

if TYPE_CHECKING:
    from rich.console import Group


def device_rates(device: str, overrides: Iterable[str] = (), price: float | None = None) -> dict[str, Any]:
    """{device, rent: {low, high, source}, own: {usd, low, high, parts, swings, leaves_out}, ...}; USD per device-hour.

    `price` replaces the purchase price of the table. Raises UserError on unknown devices, factors or absurd prices.
    """
    cpu = device.lower() == "cpu"
    if cpu and price is not None:
        raise UserError("of a cpu the table has rents alone: leave --usd out, and give --set cpu_usd_per_hour=")
    factors = load_factors(overrides, ("cpu_usd_per_hour", "cpu_watts") if cpu else OWNING)
    if cpu:
        low, high = factors["cpu_usd_per_hour"].interval
        return {
            "device": "vCPU",
            "rent": {"low": low, "high": high, "source": factors["cpu_usd_per_hour"].source},
            "own": None,
            "rate_card": rate_card("cpu", overrides=overrides).to_dict(),
        }
    if price is not None and not 0 < price <= 1e7:
        raise UserError(f"a price of {price} USD for a device is absurd: give 1 to 10,000,000")
    hardware = find_hardware(device)
    rent = None
    if hardware.rental_usd_per_hour:
        low, high, when = hardware.rental_usd_per_hour
        rent = {"low": low, "high": high, "source": f"{hardware.sources['rental_usd_per_hour']}, {when}"}
    if price is None and hardware.purchase_usd:
        price = sum(hardware.purchase_usd) / 2
    own = None
    if price is not None and hardware.watts is not None:
        own = _owning(price, hardware.watts, factors)
    if rent is None and own is None:
        raise UserError(f"the hardware table has no price for {hardware.title}: give one with --usd")
    return {"device": hardware.title, "rent": rent, "own": own, "set": list(overrides)}


def _owning(price: float, watts: float, factors: Factors) -> dict[str, Any]:
    parts = ownership(price, watts, factors)
    low, high, swings = spread(lambda f: ownership(price, watts, f).usd_per_hour, factors)
    return {
        "price_usd": price,
        "usd_per_hour": parts.usd_per_hour,
        "low": low,
        "high": high,
        "parts": asdict(parts),
        "swings": {name: list(ends) for name, ends in sorted(swings.items(), key=lambda s: s[1][0] - s[1][1])},
        "factors": {name: {"value": factors[name].value, "source": factors[name].citation} for name in swings},
        "leaves_out": list(OWNING_LEAVES_OUT),
    }


def rates_view(rates: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table

    lines: list[Any] = []
    if rates["rent"]:
        rent = rates["rent"]
        lines.append(
            f"renting one {rates['device']}: {usd(rent['low'])} to {usd(rent['high'])} an hour; {rent['source']}"
        )
    own = rates["own"]
    if own:
        lines.append(
            f"owning one bought at {usd(own['price_usd'])}: {usd(own['usd_per_hour'])} an hour of work "
            f"({usd(own['low'])} to {usd(own['high'])}): "
            + ", ".join(f"{name} {usd(value)}" for name, value in own["parts"].items())
        )
        table = Table(title="How far each factor alone moves the cost of owning")
        for name in ("factor", "value", "low", "high", "source"):
            table.add_column(name, justify="left" if name in ("factor", "source") else "right")
        for name, (low, high) in own["swings"].items():
            factor = own["factors"][name]
            table.add_row(name, f"{factor['value']:g}", usd(low), usd(high), factor["source"])
        lines += [table, "left out: " + ", ".join(own["leaves_out"])]
    lines.append("Renting and owning are two answers to one question: they are never added up.")
    return Group(*lines)
