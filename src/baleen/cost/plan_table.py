"""A plan for a terminal: what is bought, the step link by link, and the price beside what it leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baleen.cost.figures import quantity, share, signed_share, usd

if TYPE_CHECKING:
    from rich.console import Group


def plan_view(plan: dict[str, Any]) -> Group:
    """The dict of `make_plan` as tables and sentences."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    title = f"{plan['model']}: {quantity(plan['tokens'])} tokens on {quantity(plan['gpus'])} x {plan['gpu']}"
    facts = Table(title=escape(title), show_header=False)
    for row in plan_rows(plan):
        facts.add_row(*map(escape, row))
    chain = Table(title="A step, link by link")
    for name in ("link", "adds", "so far", "factor"):
        chain.add_column(name, justify="left" if name == "link" else "right")
    for link in plan["chain"]:
        cells = (f"{link['added']:.3f} s", f"{link['seconds']:.3f} s", f"{link['factor']:.3f}")
        chain.add_row(link["name"], *cells)
    tables: list[Any] = [facts, chain]
    if len(plan["alternatives"]) > 1:
        others = Table(title="The best layouts")
        for name in ("layout", "micro-batch", "step", "memory a rank"):
            others.add_column(name, justify="left" if name == "layout" else "right")
        for other in plan["alternatives"]:
            step, memory = f"{other['step_seconds']:.3f} s", f"{other['memory_gib_per_rank']:.1f} GiB"
            others.add_row(other["layout"], str(other["micro_batch"]), step, memory)
        tables.append(others)
    if "published_step" in plan:
        tables.append(_beside_published(plan))
    return Group(*tables, *map(Text, plan_sentences(plan)))


def plan_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, figure) as text."""
    price, failures = plan["usd"], plan["failures"]
    rows = [
        ("parameters", f"{quantity(plan['parameters'])}, {quantity(plan['active_parameters'])} active"),
        ("layout", f"{plan['layout']} ({plan['layout_from']}), micro-batch {plan['micro_batch']}, {plan['precision']}"),
        ("batch", f"{quantity(plan['batch_sequences'])} sequences of {quantity(plan['seq_len'])} tokens"),
        ("memory a rank", f"{plan['memory_gib_per_rank']:.1f} of {plan['capacity_gib']:.1f} GiB"),
        ("speed", f"{quantity(plan['tokens_per_second_per_gpu'])} tokens/s a GPU, step {plan['step_seconds']:.3f} s"),
        ("MFU", f"{share(plan['mfu']['value'])}: {plan['mfu']['convention']}"),
        ("GPU-hours", f"{quantity(plan['gpu_hours'])} in {plan['days']:.1f} days"),
        (
            "failures",
            f"one in {quantity(failures['mtbf_hours'])} h; a checkpoint every "
            f"{quantity(failures['checkpoint_interval_seconds'] / 60)} min; goodput {share(failures['goodput'])}",
        ),
        ("price", f"{usd(price['mid'])} ({usd(price['low'])} to {usd(price['high'])}), {plan['headline']['what']}"),
        ("whole project", f"{usd(plan['full']['usd']['mid'])} ({_interval(plan['full']['usd'])})"),
    ]
    if plan["energy_mwh"] is not None:
        rows.append(("energy", f"{quantity(plan['energy_mwh'])} MWh, building included"))
    if plan["owned_usd"] is not None:
        rows.append(("or, on owned machines", f"{usd(plan['owned_usd'])} instead of the price above"))
    rows += [
        (limit["limit"], f"{quantity(limit['needed'])} of {quantity(limit['allowed'])}: {_kept(limit['kept'])}")
        for limit in plan["limits"]
    ]
    rows += [(f"solved: {name}", text) for name, text in plan["solved"].items() if isinstance(text, str)]
    return rows


def plan_sentences(plan: dict[str, Any]) -> list[str]:
    out = [
        "The price leaves out " + "; ".join(plan["headline"]["leaves_out"]) + ".",
        f"Whole project: {plan['full']['what']}. It leaves out " + "; ".join(plan["full"]["leaves_out"]) + ".",
        f"Rates: {plan['usd_per_gpu_hour']['source']}.",
    ]
    inference = plan["inference"]
    if "why_not" in inference:
        out.append(f"Serving: {inference['why_not']}.")
    else:
        prefill, decode = (inference[part]["usd_per_million_tokens"] for part in ("prefill", "decode"))
        out.append(
            f"Serving, like {inference['like']}: {usd(prefill['mid'])} ({_interval(prefill)}) a million tokens in, "
            f"those from the cache counted too, {usd(decode['mid'])} ({_interval(decode)}) a million out."
        )
    return out


def _beside_published(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    published = plan["published_step"]
    table = Table(title="Beside the published step", caption=published["source"])
    for name in ("phase", "planned", "published", "error"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    rows = [("step", plan["step_seconds"], published["seconds"])]
    rows += [(name, plan["schedule_phases"].get(name), value) for name, value in published["phases"].items()]
    for name, planned, seen in rows:
        if planned is not None:
            table.add_row(name, f"{planned:.3f} s", f"{seen:.3f} s", signed_share(planned / seen - 1))
    return table


def _interval(prices: dict[str, float]) -> str:
    return f"{usd(prices['low'])} to {usd(prices['high'])}"


def _kept(kept: bool) -> str:
    return "kept" if kept else "exceeded"
