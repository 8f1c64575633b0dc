"""The claims as a table: for a terminal, and as Markdown for a README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from baleen.cost.claims import Claim, Claims, compute_claims, effects
from baleen.cost.figures import quantity, share, signed_share, usd
from baleen.cost.scopes import scopes_panel

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

HEAD = ("claim", "claimed", "computed", "error", "what the figure leaves out")


def claims_view(claims: Claims, overrides: Sequence[str] = ()) -> Group:
    """Table, scopes, and with overrides what they moved, for a terminal."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What was said, and what comes out")
    table.add_column("claim")
    for name in ("claimed", "computed", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    notes: list[RenderableType] = [Text("\nWhat each figure leaves out", style="bold")]
    for claim in claims.claims:
        *figures, leaves_out = claim_cells(claim)
        table.add_row(claim.label, *figures)
        notes.append(Padding(f"[bold]{claim.label}[/bold]: {leaves_out} [dim]{claim.source}[/dim]", (0, 0, 0, 2)))
    moved = effects(compute_claims(), claims) if overrides else []
    lines = [f"{row['id']}: {quantity(row['before'])} -> {quantity(row['after'])}" for row in moved]
    notes.append(Text("\nOne scope inside the other", style="bold"))
    return Group(
        table, *notes, scopes_panel(claims), *([f"moved by {' '.join(overrides)}:"] if overrides else []), *lines
    )


def claims_markdown(claims: Claims) -> str:
    rows = [HEAD, ("---", "---:", "---:", "---:", "---")]
    rows += [(claim.label, *claim_cells(claim)) for claim in claims.claims]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def claim_cells(claim: Claim) -> tuple[str, str, str, str]:
    """(claimed, computed, error, what it leaves out) as text."""
    claimed = figure(claim.claimed, claim.unit)
    if claim.computed is None or claim.relative_error is None:
        return claimed, "not derivable", "", f"Why: {claim.why} Left out: {claim.leaves_out}"
    return claimed, figure(claim.computed, claim.unit), signed_share(claim.relative_error), claim.leaves_out


def figure(value: float, unit: str) -> str:
    """A number with its unit: $5.576M, 50.4 %, 272.8B tokens/day."""
    first, _, rest = unit.partition(" ")
    if first == "USD":
        return f"{usd(value)} {rest}".rstrip()
    if unit == "share":
        return share(value)
    return f"{quantity(value)} {unit}" if unit != "x" else f"{value:.2g}x"
