"""How figures are written for people: dollars, quantities, shares, times. JSON gets the bare numbers."""

from __future__ import annotations

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def usd(value: float) -> str:
    """$5.576M, $87,072, $12.34, $0.0021."""
    if abs(value) >= 1e6:
        return f"${quantity(value)}"
    if abs(value) >= 1000:
        return f"${value:,.0f}"
    return f"${value:.2f}" if abs(value) >= 1 or value == 0 else f"${value:.2g}"


def quantity(value: float) -> str:
    """Four digits at most, with T, B, M or K: 2.788M, 272.8B, 147K, 61.5."""
    for scale, letter in SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.4g}{letter}" if abs(value) < 999.95 * scale else f"{value / scale:,.0f}{letter}"
    return f"{value:.4g}"


def share(value: float) -> str:
    """Per cent with two digits that count: 0.13 %, 5.6 %, 99 %."""
    percent = 100 * value
    return f"{percent:.2f} %" if abs(percent) < 1 else f"{percent:.1f} %"


def signed_share(value: float) -> str:
    return "exact" if abs(value) < 5e-6 else f"{100 * value:+.2g} %" if abs(value) < 1 else f"{100 * value:+.0f} %"


def duration(seconds: float) -> str:
    """12 s, 8.1 min, 3.4 h, 21 d."""
    for size, unit, digits in ((86400 * 2, "d", 1), (3600, "h", 1), (60, "min", 1)):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'd' else size):.{digits}f} {unit}"
    return f"{seconds:.0f} s"
