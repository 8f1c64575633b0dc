"""`baleen cost ...`: what a model costs, before the run, during it and after it. Words on stderr, results on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(no_args_is_help=True, help="What a model costs: before the run, during it and after it.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Change one factor: name=number. May be repeated.")]
Lab = Annotated[Path | None, typer.Option("--lab", help="The lab's folder [default: $BALEEN_LAB, or ./runs].")]


def show(result: dict[str, Any], table: RenderableType, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(result, allow_nan=False))
    else:
        from rich.console import Console

        Console().print(table)


def say(text: str) -> None:
    typer.echo(text, err=True)


@app.command()
def card(
    run: Annotated[Path, typer.Argument(help="Run directory; if it was deleted, its old path still does.")],
    json: Json = False,
) -> None:
    """What a run cost: the headline (the final run alone) beside the full price of its project."""
    from baleen.cost.card import card_view, cost_card

    result = cost_card(run)
    show(result, card_view(result), json)


@app.command()
def report(
    lab: Annotated[Path | None, typer.Argument(help="The lab's folder [default: $BALEEN_LAB, or ./runs].")] = None,
    json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained HTML page.")] = None,
    set_: Sets = None,
) -> None:
    """All that a lab spent: by project, stage and purpose; plans against measured; energy and CO2."""
    from baleen.cost.account import default_lab, read_ledger
    from baleen.cost.report import lab_report, report_tables

    lab = lab or default_lab()
    result = lab_report(lab, set_ or ())
    if html is not None:
        from baleen.cost.page import write_page

        write_page(result, read_ledger(lab), html)
        say(f"wrote {html}")
    show(result, report_tables(result), json)


@app.command()
def mark(
    run: Annotated[Path, typer.Argument(help="Run directory, or the name or id of a run whose directory is gone.")],
    purpose: Annotated[str, typer.Argument(help="final, research, ablation or failed")],
    lab: Lab = None,
) -> None:
    """Say what a run was for; holds for all its stages so far."""
    from baleen.cost.account import mark as mark_run
    from baleen.cost.ledger import lab_of

    run_id = mark_run(lab or lab_of(run), run, purpose)  # pyright: ignore[reportArgumentType]
    say(f"marked {run_id} as {purpose}")


@app.command()
def add(
    category: Annotated[str, typer.Option(help="people, data, hardware or other")],
    usd: Annotated[float, typer.Option(help="US dollars")],
    period: Annotated[str, typer.Option(help="A..B: days, months or years, such as 2026-01..2026-03")],
    project: Annotated[str | None, typer.Option(help="[default: the whole lab]")] = None,
    note: Annotated[str, typer.Option(help="What it was")] = "",
    lab: Lab = None,
) -> None:
    """Record what was paid beside compute."""
    from baleen.cost.account import add as add_cost
    from baleen.cost.account import default_lab

    lab = lab or default_lab()
    add_cost(lab, category, usd, period, project, note)
    say(f"recorded {usd:g} USD of {category} in {lab / 'ledger'}")


@app.command()
def claims(
    json: Json = False,
    set_: Sets = None,
    svg: Annotated[Path | None, typer.Option(help="Also write the picture of the scopes.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
) -> None:
    """What was said of DeepSeek's costs, computed again; and the scopes one inside the other."""
    from baleen.cost.claims import claims_dict, compute_claims

    overrides = tuple(set_ or ())
    result = compute_claims(overrides)
    if svg is not None:
        from baleen.cost.scopes import scopes_svg

        svg.write_text(scopes_svg(result), encoding="utf-8")
        say(f"wrote {svg}")
    if markdown and not json:
        from baleen.cost.claims_table import claims_markdown

        print(claims_markdown(result))
        return
    from baleen.cost.claims_table import claims_view

    show(claims_dict(overrides), claims_view(result, overrides), json)


@app.command()
def rate(
    device: Annotated[str, typer.Argument(help="A device of the hardware table, such as h800 or b200, or cpu.")],
    json: Json = False,
    set_: Sets = None,
    usd: Annotated[float | None, typer.Option(help="Price of the device in its server [default: the table's].")] = None,
) -> None:
    """What an hour of a device costs: renting beside owning, and how far each factor moves the latter."""
    from baleen.cost.rates import device_rates, rates_view

    result = device_rates(device, set_ or (), usd)
    show(result, rates_view(result), json)
