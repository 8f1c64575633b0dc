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
    elif isinstance(table, str):
        print(table)
    else:
        from rich.console import Console

        Console().print(table)


def say(text: str) -> None:
    typer.echo(text, err=True)


def save(path: Path, text: str) -> None:
    from baleen.config import UserError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another file") from None
    say(f"wrote {path}")


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
    from baleen.cost.account import lab_of_run
    from baleen.cost.account import mark as mark_run

    run_id = mark_run(lab or lab_of_run(run), run, purpose)  # pyright: ignore[reportArgumentType]
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

        save(svg, scopes_svg(result))
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


@app.command()
def project(
    final: Annotated[str, typer.Option(help="Price of the final run, such as 5.576M")],
    people: Annotated[float, typer.Option(help="Full-time people")] = 0.0,
    years: Annotated[float, typer.Option(help="For how long")] = 1.0,
    json: Json = False,
    set_: Sets = None,
) -> None:
    """From the price of a final run to that of its project: research, failures, people."""
    from baleen.cost.project import project_cost, project_view
    from baleen.cost.quantities import parse_dollars

    result = project_cost(parse_dollars(final, "--final"), people, years, set_ or ())
    show(result, project_view(result), json)


@app.command()
def plan(
    gpu: Annotated[str, typer.Option(help="A device of the hardware table, such as h800; or of --hardware.")],
    model: Annotated[str | None, typer.Option(help="A recipe, a config.json, or a name such as v3-671b.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Such as 14.8T")] = None,
    gpus: Annotated[str | None, typer.Option(help="How many devices")] = None,
    layout: Annotated[str | None, typer.Option(help="Such as PP16,EP64,ZeRO1,dualpipe")] = None,
    search: Annotated[bool, typer.Option(help="Find the best layouts.")] = False,
    budget: Annotated[str | None, typer.Option(help="Such as 1M: solve for what is not given.")] = None,
    deadline: Annotated[str | None, typer.Option(help="Such as 30d")] = None,
    energy: Annotated[str | None, typer.Option(help="Such as 500MWh")] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences a step")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence")] = None,
    precision: Annotated[str | None, typer.Option(help="fp8, bf16 or fp32")] = None,
    usd_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of a device-hour [default: table]")] = None,
    law: Annotated[str | None, typer.Option(help="Sizes a model: deepseek or chinchilla [default: deepseek]")] = None,
    set_: Sets = None,
    hardware: Annotated[list[Path] | None, typer.Option(help="TOML files with more devices.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the plan into the ledger of this run.")] = None,
    json: Json = False,
) -> None:
    """Plan a run: layout, memory, step by link, hours, energy, dollars; or what a budget or a deadline buys."""
    from baleen.cost.plan import make_plan
    from baleen.cost.plan_request import parse_request
    from baleen.cost.plan_table import plan_view

    request = parse_request(
        gpu, model, tokens, gpus, budget, deadline, energy, batch,
        layout=layout, search=search, seq_len=seq_len, precision=precision, usd_per_hour=usd_per_hour, law=law,
        sets=tuple(set_ or ()), hardware_files=tuple(hardware or ()),
    )  # fmt: skip
    result = make_plan(request)
    if record is not None:
        from baleen.cost.account import amend, lab_of_run

        amend(
            lab_of_run(record), record, {"plan": {"usd": result["usd"]["mid"], "device_hours": result["device_hours"]}}
        )
        say(f"recorded the plan with {record}")
    show(result, plan_view(result), json)


@app.command()
def place(
    run: Annotated[Path, typer.Argument(help="A run whose experts' load was recorded.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that the experts of a layer are spread over")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that those stand in")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="Groups of experts (n_group)")] = 1,
    redundant: Annotated[int, typer.Option(min=0, help="Further copies of busy experts")] = 0,
    json: Json = False,
) -> None:
    """Place a run's experts by their recorded load (EPLB): the busiest GPU over the mean, before and after."""
    from baleen.cost.load_trace import place_on_trace

    told = place_on_trace(run, gpus=gpus, nodes=nodes, groups=groups, redundant=redundant)
    words = (
        f"busiest GPU over the mean: {told['before']:.3f} with experts in order, {told['after']:.3f} placed with "
        f"{redundant} copies more ({told['records']} records, {told['layers']} layers)\n"
        f"in a plan: baleen cost plan ... --set {told['set']}"
    )
    show(told, words, json)


simulate_app = typer.Typer(no_args_is_help=True, help="Execute pipeline schedules, or the failures of a long run.")
app.add_typer(simulate_app, name="simulate")


@simulate_app.command()
def schedules(
    schedule: Annotated[str, typer.Option(help="gpipe, 1f1b, interleaved, zb1p, dualpipe, dualpipev or all")] = "all",
    ranks: Annotated[int, typer.Option(help="Pipeline ranks")] = 8,
    microbatches: Annotated[int, typer.Option(help="Micro-batches a step")] = 16,
    forward: Annotated[float, typer.Option(help="Seconds of a rank's share of the network, forward")] = 1.0,
    backward: Annotated[float, typer.Option(help="The same, backward, weights included")] = 2.0,
    weight: Annotated[float, typer.Option(help="Seconds of the weights' part")] = 1.0,
    overlap: Annotated[float, typer.Option(help="Time of an overlapped pair over the sum of its parts")] = 1.0,
    latency: Annotated[float, typer.Option(help="Seconds from rank to rank")] = 0.0,
    svg: Annotated[Path | None, typer.Option(help="Also draw the chart of one schedule.")] = None,
    json: Json = False,
) -> None:
    """Execute schedules stage by stage: bubbles, activations, Gantt charts."""
    from baleen.cost.schedules_table import run_schedules, schedule_svg, schedules_dict, schedules_view
    from baleen.cost.simulator import Durations

    timelines = run_schedules(schedule, ranks, microbatches, Durations(forward, backward, weight, overlap, latency))
    if svg is not None:
        save(svg, schedule_svg(timelines))
    show(schedules_dict(timelines), schedules_view(timelines), json)


@simulate_app.command()
def failures(
    gpus: Annotated[int, typer.Option(help="Devices of the job")] = 2048,
    days: Annotated[float, typer.Option(help="Days of productive work")] = 30.0,
    interval: Annotated[float | None, typer.Option(help="Seconds between checkpoints [default: Young-Daly]")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    set_: Sets = None,
    json: Json = False,
) -> None:
    """Play a long run event by event: failures, checkpoints, restarts, and the share of time that counts."""
    from baleen.cost.failures import failures_report
    from baleen.cost.failures_table import failures_view

    result = failures_report(gpus, days, set_ or (), interval_seconds=interval, seed=seed)
    show(result, failures_view(result), json)


@app.command()
def validate(
    cases: Annotated[Path | None, typer.Argument(help="Published runs, as CSV [default: those that ship].")] = None,
    calibrate_on: Annotated[str | None, typer.Option(help="Fit the constants on this split of the file.")] = None,
    hardware: Annotated[list[Path] | None, typer.Option(help="TOML files with more devices.")] = None,
    set_: Sets = None,
    json: Json = False,
) -> None:
    """Predict published runs, and print the errors by kind beside a baseline of constant MFU."""
    from baleen.cost.validate import render
    from baleen.cost.validate import validate as validate_cases

    result = validate_cases(cases, calibrate_on, tuple(hardware or ()), tuple(set_ or ()))
    show(result, render(result), json)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Hardware file to write into.")] = Path("hardware.toml"),
    name: Annotated[str, typer.Option(help="What this machine is to be called.")] = "cpu",
    json: Json = False,
) -> None:
    """Measure this machine in a minute, so that plans can be made for it: `plan --gpu NAME --hardware FILE`."""
    from baleen.cost.calibrate import calibrate as measure
    from baleen.cost.calibrate import render

    say("measuring ...")
    result = measure(out, name)
    show(result, render(result), json)
