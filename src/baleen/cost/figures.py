"""How figures are written for people: dollars, quantities, shares. JSON gets the bare numbers."""

from __future__ import annotations

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def usd(value: float) -> str:
    """$5.576M, $87,072, $12.34, $0.082, $0.0021."""
    if abs(value) >= 1000:
        return f"${quantity(value)}"
    if abs(value) >= 1 or value == 0:
        return f"${value:.2f}"
    return f"${value:.3f}" if abs(value) >= 0.01 else f"${value:.2g}"


def quantity(value: float) -> str:
    """Four digits, with T, B or M; thousands in full: 2.788M, 272.8B, 147,000, 61.5."""
    for scale, letter in SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.4g}{letter}" if abs(value) < 999.5 * scale else f"{value / scale:,.0f}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float) -> str:
    """Per cent with two digits that count: 0.13 %, 5.6 %, 99 %."""
    percent = 100 * value
    return f"{percent:.2f} %" if abs(percent) < 1 else f"{percent:.1f} %"


def signed_share(value: float) -> str:
    return "exact" if abs(value) < 5e-6 else f"{100 * value:+.2g} %" if abs(value) < 0.995 else f"{100 * value:+.0f} %"


def energy(joules: float) -> str:
    """2,546 MWh, 554.4 kWh, 0.047 Wh."""
    return _scaled(joules / 3600, ((1e9, "GWh"), (1e6, "MWh"), (1e3, "kWh")), "Wh")


def mass(kilograms: float) -> str:
    """1.2 t, 674 kg, 3.6 g."""
    return _scaled(kilograms * 1e3, ((1e6, "t"), (1e3, "kg")), "g")


def duration(seconds: float) -> str:
    """42 s, 3:07, 2:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def _scaled(value: float, scales: tuple[tuple[float, str], ...], smallest: str) -> str:
    scale, unit = next(((scale, unit) for scale, unit in scales if abs(value) >= scale), (1.0, smallest))
    return f"{value / scale:,.4g} {unit}" if abs(value) < 1e4 * scale else f"{value / scale:,.0f} {unit}"
