"""A plan before the run: layout, memory, step by link, hours, energy and dollars; or what a budget or deadline buys."""

from __future__ import annotations

from typing import Any

from baleen.config import UserError
from baleen.cost.assumptions import Assumptions, load_assumptions
from baleen.cost.failures import young_daly_seconds
from baleen.cost.flops import active_parameters, parameters
from baleen.cost.hardware import find_hardware
from baleen.cost.inference import serving_cost
from baleen.cost.memory import GIB
from baleen.cost.phases import published_step, schedule_phases
from baleen.cost.plan_layout import Chosen
from baleen.cost.plan_money import Prices, device_prices, plan_money
from baleen.cost.plan_request import Request
from baleen.cost.plan_solve import solve
from baleen.cost.step import predict


def make_plan(request: Request) -> dict[str, Any]:
    """The plan as plain values, for `baleen cost plan --json`.

    Raises UserError for what cannot run: it names the fault, by how much, and the nearest that can.
    """
    facts = load_assumptions(find_hardware(request.gpu, *request.hardware_files), request.sets)
    prices = device_prices(facts, request.usd_per_hour)
    try:
        chosen, tokens, solved = solve(request, facts, prices)
        return _report(request, facts, prices, chosen, tokens, solved)
    except ZeroDivisionError:
        raise UserError("a factor that is divided by was set to 0: give it another value") from None


def _report(
    request: Request, facts: Assumptions, prices: Prices, chosen: Chosen, tokens: float, solved: dict[str, Any]
) -> dict[str, Any]:
    model, on, best = chosen.model, chosen.on, chosen.layouts[0]
    work = best.work
    predicted = predict(work, facts.calibration)
    step = predicted["step_seconds"]
    hours = tokens / chosen.tokens_per_second / 3600 * chosen.gpus
    usual_goodput = min(chosen.goodput, facts.calibration["goodput"])
    chain = [*predicted["chain"], _goodput_link(step, chosen.goodput)]
    mtbf = facts.reliability.mtbf_seconds(chosen.gpus)
    published = published_step(request.model or "", facts.hardware.name, work)
    out = {
        "model": model.name,
        "parameters": parameters(model.arch)["total"],
        "active_parameters": active_parameters(model.arch),
        "tokens": tokens,
        "gpu": facts.hardware.title,
        "gpus": chosen.gpus,
        "precision": on.precision,
        "batch_sequences": on.batch,
        "seq_len": on.seq_len,
        "layout": predicted["layout"],
        "layout_from": chosen.layout_from,
        "micro_batch": best.layout.micro_batch,
        "alternatives": [
            {"layout": str(c.layout), "micro_batch": c.layout.micro_batch, "step_seconds": c.step.seconds,
             "memory_gib_per_rank": c.memory.total / GIB}
            for c in chosen.layouts
        ],
        "gpu_hours": hours,
        "device_hours": hours * (facts.hardware.threads or 1 if facts.hardware.is_cpu else 1),  # as ledgers count them
        "days": hours / chosen.gpus / 24,
        "step_seconds": step,
        "steps": tokens / work.tokens,
        "chain": chain,
        "phases": predicted["phases"],
        "tokens_per_second_per_gpu": predicted["tokens_per_second_per_gpu"],
        "mfu": predicted["mfu"],
        "memory_gib_per_rank": best.memory.total / GIB,
        "memory": {name: value / GIB for name, value in best.memory._asdict().items()},
        "capacity_gib": on.hardware.memory_gb * 1e9 / GIB,
        "energy_mwh": prices.mwh and hours * prices.mwh,
        "failures": {
            "mtbf_hours": mtbf / 3600,
            "checkpoint_interval_seconds": young_daly_seconds(facts.reliability.checkpoint_seconds, mtbf),
            "goodput": chosen.goodput,
            "goodput_of_published_runs": facts.calibration["goodput"],
        },
        **plan_money(facts, prices, hours, hours * chosen.goodput / usual_goodput),
        "inference": serving_cost(
            model.arch, on.hardware, on.precision, prices[:3], facts.serving, model.node_limit
        ),
        "solved": solved,
        "limits": _limits(request, prices, hours, chosen.gpus),
        "set": list(request.sets),
    }  # fmt: skip
    if best.layout.pipeline > 1:
        out["schedule_phases"] = schedule_phases(work, facts.calibration, best.step)
    if published:
        out["published_step"] = published
    return out


def _goodput_link(step: float, goodput: float) -> dict[str, Any]:
    return {"name": "goodput", "seconds": step / goodput, "added": step / goodput - step, "factor": 1 / goodput}


def _limits(request: Request, prices: Prices, hours: float, gpus: int) -> list[dict[str, Any]]:
    """Each limit that was named, what the plan needs, and whether it keeps to it."""
    needs = (
        ("budget_usd", request.budget_usd, hours * prices.mid),
        ("deadline_days", request.deadline_seconds and request.deadline_seconds / 86400, hours / gpus / 24),
        ("energy_mwh", request.energy_mwh, prices.mwh and hours * prices.mwh),
    )
    return [
        {"limit": name, "allowed": allowed, "needed": needed, "kept": needed <= allowed * 1.001}
        for name, allowed, needed in needs
        if allowed and needed
    ]
