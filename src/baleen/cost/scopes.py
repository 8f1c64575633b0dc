"""The picture of the scopes: final run inside research inside the fleet, with areas true to scale."""

from __future__ import annotations

from html import escape
from math import sqrt
from typing import TYPE_CHECKING

from baleen.cost.claims import Claims, Scope
from baleen.cost.figures import quantity, share, usd

if TYPE_CHECKING:
    from rich.panel import Panel

PANEL = 420  # px, side of the square that stands for the fleet
LENS = 288  # px, side of the magnified square
GAP = 28
MARGIN = 20
TOP = 96
STYLE = """
  .page { fill: #ffffff } .fleet { fill: #eef1f5; stroke: #b6c0cc } .lens { fill: #ffffff; stroke: #8b98a8 }
  .range { fill: none; stroke: #c2410c; stroke-dasharray: 4 4 } .research { fill: #fed7aa; stroke: #ea580c }
  .r1 { fill: #fb923c; stroke: #c2410c } .final { fill: #c2410c; stroke: #7c2d12 } .ray { stroke: #8b98a8 }
  text { font: 12px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1f2937 }
  .title { font-size: 18px; font-weight: 650 } .head { font-size: 14px; font-weight: 600 }
  .soft { fill: #5b6675 } .on { fill: #7c2d12 } .strong { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .fleet { fill: #1b222c; stroke: #46515f } .lens { fill: #0d1117; stroke: #6b7888 }
    .range { stroke: #fb923c } .research { fill: #5a2c10; stroke: #f97316 } .r1 { fill: #b4500f; stroke: #fdba74 }
    .final { fill: #fb923c; stroke: #ffedd5 } .ray { stroke: #6b7888 }
    text { fill: #e6edf3 } .soft { fill: #9aa7b5 } .on { fill: #fed7aa }
  }"""


def scopes_svg(claims: Claims) -> str:
    """A self-contained SVG for light and dark pages."""
    width, height = 2 * (PANEL + MARGIN) + GAP, TOP + PANEL + 100
    rest = claims.unexplained
    unexplained = share(rest.gpu_hours[0] / claims.scopes[-1].gpu_hours[0])
    footer = (
        (f"Unexplained: {unexplained} of the fleet's hours, {usd(rest.owned_usd[0])}.", "strong"),
        (f"In it: {rest.note}.", "soft"),
        (f"Dashed: the interval of the research multiplier, {claims.scopes[-2].note}.", "soft"),
        (
            f"Owning an H800 for an hour is put at ${claims['owned_h800_hour'].computed:.2f}. "
            "The headline's $2 is rent; the two are never added.",
            "soft",
        ),
    )
    body = [
        _text(MARGIN, 34, "$5.6M and $1.6B are both said of one model: the scopes, one inside the other", "title"),
        _text(MARGIN, 56, "Areas are true to scale; the corner of each square is magnified in its lens.", "soft"),
        *_panel(claims, "GPU-hours", "gpu_hours", MARGIN),
        *_panel(claims, "Dollars of owning", "owned_usd", MARGIN + PANEL + GAP),
        *(_text(MARGIN, TOP + PANEL + 26 + 19 * row, text, name) for row, (text, name) in enumerate(footer)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="Scopes of DeepSeek-V3 costs, nested"><style>{STYLE}\n</style>\n'
        f'<rect class="page" width="{width}" height="{height}" rx="8"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _panel(claims: Claims, title: str, key: str, left: float) -> list[str]:
    final, with_r1, research, fleet = claims.scopes
    write = (lambda value: f"{quantity(value)} h") if key == "gpu_hours" else usd
    whole = getattr(fleet, key)[0]
    middle, low, high = getattr(research, key)
    bottom = TOP + PANEL

    def side(value: float, square: float, of: float) -> float:
        return square * sqrt(value / of)

    tiny = side(high, PANEL, whole)
    lens_x, lens_y = left + PANEL - LENS - 14, TOP + 52
    lens_bottom = lens_y + LENS
    out = [
        _text(left, TOP - 12, title, "head"),
        _square("fleet", left, bottom, PANEL),
        _text(left + 12, TOP + 22, f"{fleet.label}: {_with_interval(fleet, key, write)}", "strong"),
    ]
    for name, value in (("range", high), ("research", middle), ("r1", getattr(with_r1, key)[0])):
        out.append(_square(name, left, bottom, side(value, PANEL, whole)))
    out += [
        _line("ray", left, bottom - tiny, lens_x, lens_y),
        _line("ray", left + tiny, bottom, lens_x + LENS, lens_bottom),
        _square("lens", lens_x, lens_bottom, LENS),
    ]
    inset = LENS - 26  # the highest bound fills the lens but for a margin
    sides = {}
    for name, value in (
        ("range", high),
        ("research", middle),
        ("range", low),
        ("r1", getattr(with_r1, key)[0]),
        ("final", getattr(final, key)[0]),
    ):
        sides[name] = side(value, inset, high)
        out.append(_square(name, lens_x, lens_bottom, sides[name]))
    x = lens_x + 8
    out.append(_text(x, lens_bottom - inset - 7, f"high bound: {write(high)}", "soft"))
    out.append(_text(x, lens_bottom - sides["research"] + 17, research.label, "on strong"))
    out.append(_text(x, lens_bottom - sides["research"] + 33, write(middle), "on"))
    out.append(_text(x, lens_bottom - sides["range"] - 6, f"low bound: {write(low)}", "on"))
    x = lens_x + sides["range"] + 6
    for row, (scope, name) in enumerate(((with_r1, "r1"), (final, "final"))):
        y = lens_bottom - sides[name] + 14 + 34 * row
        out.append(_text(x, y, scope.label, "on strong"))
        out.append(_text(x, y + 14, write(getattr(scope, key)[0]), "on"))
    return out


def _square(name: str, left: float, bottom: float, side: float) -> str:
    return f'<rect class="{name}" x="{left:.1f}" y="{bottom - side:.1f}" width="{side:.1f}" height="{side:.1f}"/>'


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, name: str = "") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}">{escape(text, quote=False)}</text>'


def _with_interval(scope: Scope, key: str, write) -> str:
    value, low, high = getattr(scope, key)
    return write(value) if low == high else f"{write(value)} ({write(low)} to {write(high)})"


def scopes_panel(claims: Claims) -> Panel:
    """The same picture for a terminal: boxes in boxes."""
    from rich.console import Group
    from rich.panel import Panel

    fleet = claims.scopes[-1]
    inner: Panel | str = ""
    for scope in claims.scopes:
        hours = _with_interval(scope, "gpu_hours", lambda value: f"{quantity(value)} GPU-hours")
        of_fleet = "" if scope is fleet else f" = {share(scope.gpu_hours[0] / fleet.gpu_hours[0])} of the fleet's"
        line = f"{hours}{of_fleet}\n{_with_interval(scope, 'owned_usd', usd)} of owning\n[dim]{scope.note}[/dim]"
        if scope is fleet:
            rest = claims.unexplained
            line += (
                f"\n[bold]unexplained: {quantity(rest.gpu_hours[0])} GPU-hours "
                f"({share(rest.gpu_hours[0] / fleet.gpu_hours[0])}), {_with_interval(rest, 'owned_usd', usd)}[/bold]"
                f"\n[dim]{rest.note}[/dim]"
            )
        inner = Panel(Group(line, inner) if inner else line, title=f"[bold]{scope.label}", title_align="left")
    assert not isinstance(inner, str)
    return inner
