"""Plots of the notebook as SVG: intervals of effects, and losses over size. They follow the reader's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT, LINE = 760, 290, 90, 22
STYLE = (
    "<style>text{font:12px sans-serif;fill:#222}line,polyline{stroke:#888;fill:none}.a{stroke:#1f77b4;fill:#1f77b4}"
    ".b{stroke:#d62728;fill:#d62728}polyline.a,polyline.b{fill:none;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
)


class Effect(NamedTuple):
    label: str
    mean: float
    half: float  # of the interval


def _svg(height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}">\n{STYLE}\n{body}\n</svg>\n'


def intervals(effects: Sequence[Effect]) -> str:
    """One line an effect, relative to its first arm, with its 95 % interval; 0 in the middle of all."""
    reach = 1.1 * max((abs(e.mean) + e.half for e in effects if math.isfinite(e.half)), default=0.01) or 0.01
    middle, scale = (LEFT + WIDTH - RIGHT) / 2, (WIDTH - RIGHT - LEFT) / 2 / reach
    height = LINE * (len(effects) + 1.5)
    parts = [f'<line x1="{middle:.1f}" y1="0" x2="{middle:.1f}" y2="{height - LINE:.1f}"/>']
    for number, (label, mean, half) in enumerate(effects):
        y, x = LINE * (number + 0.7), middle + mean * scale
        low, high = x - half * scale, x + half * scale
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>',
            f'<line class="a" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>',
            f'<circle class="a" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>',
            f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">{mean:+.2%}</text>',
        ]
    for share in (-0.9, 0.0, 0.9):
        x = middle + share * reach * scale
        parts.append(f'<text x="{x:.1f}" y="{height - 6:.1f}" text-anchor="middle">{share * reach:+.1%}</text>')
    return _svg(height, parts)


def losses_by_size(points: dict[str, list[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """Two series of (size, loss), the sizes on a logarithmic axis."""
    everything = [point for series in points.values() for point in series]
    xs, ys = [math.log10(x) for x, _ in everything], [y for _, y in everything]
    height, left, bottom = 340, 70, 40

    def place(x: float, y: float) -> tuple[float, float]:
        wide, high = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
        across = left + 20 + (math.log10(x) - min(xs)) / wide * (WIDTH - left - 180)
        return across, height - bottom - 15 - (y - min(ys)) / high * (height - bottom - 40)

    parts = [
        f'<line x1="{left}" y1="10" x2="{left}" y2="{height - bottom}"/>',
        f'<line x1="{left}" y1="{height - bottom}" x2="{WIDTH - 20}" y2="{height - bottom}"/>',
        f'<text x="{WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text x="8" y="12">{escape(y_name)}</text>',
    ]
    for x in sorted({x for x, _ in everything}):
        parts.append(
            f'<text x="{place(x, ys[0])[0]:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:.2g}</text>'
        )
    for y in (min(ys), max(ys)):
        parts.append(
            f'<text x="{left - 6}" y="{place(everything[0][0], y)[1] + 4:.1f}" text-anchor="end">{y:.3f}</text>'
        )
    for (name, series), colour in zip(points.items(), "ab", strict=False):
        placed = [place(x, y) for x, y in sorted(series)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="{colour}" points="{line}"/>')
        parts += [f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in placed]
        x, y = placed[-1]
        parts.append(f'<text x="{x + 10:.1f}" y="{y + 4:.1f}">{escape(name)}</text>')
    return _svg(height, parts)
