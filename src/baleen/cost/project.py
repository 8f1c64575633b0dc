"""From the price of a final run to that of its project: research, failures and people, beside the headline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from baleen.config import UserError
from baleen.cost.factors import Factors, spread
from baleen.cost.figures import quantity, usd
from baleen.cost.money import load_factors, people_usd, whole_project_usd

if TYPE_CHECKING:
    from rich.console import Group

HEADLINE_LEAVES_OUT = ("research, ablations and failed runs", "people", "data", "serving")
FULL_LEAVES_OUT = ("data", "serving", "offices, management and what the machines do besides")


FACTORS = ("research_multiplier", "people_usd_per_year")


def project_cost(final_usd: float, people: float, years: float, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """{headline_usd, compute_usd, people_usd, full_usd, ...}: the last three as {low, mid, high}.

    `people` full-time over `years`. The interval of the full price combines both factors as independent errors.
    Raises UserError on absurd quantities or unknown factors.
    """
    for name, value, most in (("--people", people, 1e6), ("--years", years, 100)):
        if not 0 <= value <= most:
            raise UserError(f"{name} {value:g} is absurd: give 0 to {most:,.0f}")
    factors = load_factors(overrides, FACTORS)

    def full(f: Factors) -> float:
        return whole_project_usd(final_usd, f)[1] + people_usd(people, years, f)

    low, high, _ = spread(full, factors)
    compute = whole_project_usd(final_usd, factors)
    wage = factors["people_usd_per_year"]
    wages = [people * years * value for value in (wage.interval[0], wage.value, wage.interval[1])]
    ends = ("low", "mid", "high")
    return {
        "headline_usd": final_usd,
        "compute_usd": dict(zip(ends, compute, strict=True)),
        "people_usd": dict(zip(ends, wages, strict=True)),
        "full_usd": {"low": low, "mid": full(factors), "high": high},
        "ratio": full(factors) / final_usd,
        "factors": {name: {"value": factors[name].value, "source": factors[name].citation} for name in FACTORS},
        "headline_leaves_out": list(HEADLINE_LEAVES_OUT),
        "full_leaves_out": list(FULL_LEAVES_OUT),
        "set": list(overrides),
    }


def project_view(project: dict[str, Any]) -> Group:
    """The dict of `project_cost` as a table and sentences."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="From a final run to its project")
    for name in ("", "low", "middle", "high"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("headline: the final run alone", "", usd(project["headline_usd"]), "")
    for name, label in (
        ("compute_usd", "compute, with research and failures"),
        ("people_usd", "people"),
        ("full_usd", "full: both together"),
    ):
        table.add_row(label, *(usd(project[name][end]) for end in ("low", "mid", "high")))
    lines = [f"{quantity(project['ratio'])} times the headline."]
    lines += [f"{name} {f['value']:g}: {f['source']}." for name, f in project["factors"].items()]
    lines.append("The headline leaves out " + "; ".join(project["headline_leaves_out"]) + ".")
    lines.append("The full price leaves out " + "; ".join(project["full_leaves_out"]) + ".")
    return Group(table, *map(Text, lines))
