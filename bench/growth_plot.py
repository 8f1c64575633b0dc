"""Draws what growth.py measured: `python bench/growth_plot.py [docs/growth.json]` -> growth-{time,memory}.svg there.

A panel an axis, both scales logarithmic; dots are measured, the dashed line is theory: in time from the first dot on,
in memory outright.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from growth import medians

WIDTH, HEIGHT, MARGIN = 250, 190, 50  # of a panel, pixels
COLUMNS = 3
STYLE = """<style>
  text { font: 11px system-ui, sans-serif; fill: #57606a } .head { font-weight: 600 }
  .axis { stroke: #8b98a8; fill: none } .measured { stroke: #0969da; fill: none } .dot { fill: #0969da }
  .theory { stroke: #c2410c; fill: none; stroke-dasharray: 5 4 } .update { stroke: #8b98a8; fill: none }
  @media (prefers-color-scheme: dark) { text { fill: #9198a1 } .measured { stroke: #58a6ff } .dot { fill: #58a6ff } }
</style>"""
Line = tuple[str, list[float]]  # class, values


def ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or what lies at either end where there are fewer than two."""
    powers = [10.0**e for e in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return powers if len(powers) > 1 else [low, high]


def short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def panel(title: str, xs: Sequence[int], lines: Sequence[Line]) -> list[str]:
    values = [value for _, line in lines for value in line]
    low, high = min(values) / 1.3, max(values) * 1.3

    def x(value: float) -> float:
        return MARGIN + (WIDTH - MARGIN - 15) * math.log(value / xs[0]) / math.log(xs[-1] / xs[0])

    def y(value: float) -> float:
        return HEIGHT - 25 - (HEIGHT - 55) * math.log(value / low) / math.log(high / low)

    out = [f'<text class="head" x="{MARGIN}" y="16">{title}</text>']
    out.append(f'<path class="axis" d="M{MARGIN} 28V{HEIGHT - 25}H{WIDTH - 10}"/>')
    for tick in ticks(low, high):
        out.append(f'<text x="{MARGIN - 5}" y="{y(tick) + 4:.0f}" text-anchor="end">{short(tick)}</text>')
    for value in (xs[0], xs[-1]):
        out.append(f'<text x="{x(value):.0f}" y="{HEIGHT - 9}" text-anchor="middle">{value:,}</text>')
    for name, line in lines:
        at = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(xs, line, strict=True)]
        out.append(f'<path class="{name}" d="M{"L".join(at)}"/>')
        if name == "measured":
            out += [
                f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in zip(xs, line, strict=True)
            ]
    return out


def of_time(rows: list[dict[str, Any]]) -> list[Line]:
    scale = 1e6 * rows[0]["seconds"] / rows[0]["theory"]["seconds"]
    lines = [("theory", [scale * row["theory"]["seconds"] for row in rows])]
    if "optimizer_seconds" in rows[0]:
        lines.append(("update", [1e6 * row["optimizer_seconds"] for row in rows]))
    return [*lines, ("measured", [1e6 * row["seconds"] for row in rows])]


def of_memory(rows: list[dict[str, Any]]) -> list[Line]:
    return [("theory", [row["theory"]["bytes"] for row in rows]), ("measured", [row["bytes"] for row in rows])]


def drawing(rows: list[dict[str, Any]], unit: str, lines: Callable[[list[dict[str, Any]]], list[Line]]) -> str:
    kind = itemgetter("work", "precision", "axis")
    kinds = dict.fromkeys(map(kind, rows))
    height = -(-len(kinds) // COLUMNS) * HEIGHT
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * WIDTH} {height}">', STYLE]
    for i, (work, precision, axis) in enumerate(kinds):
        mine = sorted((row for row in rows if kind(row) == (work, precision, axis)), key=itemgetter("value"))
        out.append(f'<g transform="translate({i % COLUMNS * WIDTH} {i // COLUMNS * HEIGHT})">')
        out += panel(f"{work} {precision}, {axis}: {unit}", [row["value"] for row in mine], lines(mine))
        out.append("</g>")
    return "\n".join([*out, "</svg>\n"])


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/growth.json")
    rows = medians(json.loads(source.read_text())["rows"])
    source.with_name("growth-time.svg").write_text(drawing(rows, "µs a token", of_time))
    source.with_name("growth-memory.svg").write_text(drawing(rows, "bytes", of_memory))


if __name__ == "__main__":
    main()
