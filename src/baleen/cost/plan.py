"""A plan before the run: layout, memory, step by link, hours, energy and dollars; or what a budget or deadline buys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from baleen.config import UserError
from baleen.cost.assumptions import Assumptions, load_assumptions
from baleen.cost.candidates import MEMORY_SHARE
from baleen.cost.failures import expected_goodput, young_daly_seconds
from baleen.cost.flops import active_parameters, parameters, training_flops
from baleen.cost.hardware import find_hardware
from baleen.cost.inference import serving_cost
from baleen.cost.layout import StatedLayout
from baleen.cost.memory import GIB
from baleen.cost.phases import published_step, schedule_phases
from baleen.cost.plan_money import Prices, device_prices, plan_money
from baleen.cost.planned_model import PlannedModel, load_model, usual_batch
from baleen.cost.quantities import parse_count, parse_dollars, parse_megawatt_hours, parse_seconds
from baleen.cost.scaling import Allocation, allocate, v3_shaped_for
from baleen.cost.search import Candidate, Conditions, explain_no_layout, search_layouts, user_layout, workload
from baleen.cost.step import predict

USUAL_DAYS = 30.0  # of a run, where a budget is given and no deadline
MOST_DEVICES = 131_072
# Layouts that the authors of a model published, taken where neither --layout nor --search asks for another.
PUBLISHED_LAYOUTS = {
    "v3-671b": ("PP16,EP64,ZeRO1,dualpipe,recompute-deepseek", "as published: arXiv 2412.19437 §3.2"),
    "dsv3": ("PP16,EP64,ZeRO1,dualpipe,recompute-deepseek", "as published: arXiv 2412.19437 §3.2"),
}


@dataclass(frozen=True)
class Request:
    """What is asked for. None: to be solved for, or the model's and table's usual value. Batch in sequences."""

    gpu: str
    model: str | None = None
    tokens: float | None = None
    gpus: int | None = None
    layout: str | None = None
    search: bool = False
    budget_usd: float | None = None
    deadline_seconds: float | None = None
    energy_mwh: float | None = None
    batch: int | None = None
    seq_len: int | None = None
    precision: str | None = None
    usd_per_hour: float | None = None
    law: str = "deepseek"
    sets: tuple[str, ...] = ()
    hardware_files: tuple[Path, ...] = ()


class Chosen(NamedTuple):
    """A model on a number of devices with its layouts, best first, and why the first was taken."""

    model: PlannedModel
    gpus: int
    on: Conditions
    layouts: list[Candidate]
    layout_from: str
    tokens_per_second: float  # of the whole run, goodput included
    goodput: float


def parse_request(
    gpu: str,
    model: str | None = None,
    tokens: str | None = None,
    gpus: str | None = None,
    budget: str | None = None,
    deadline: str | None = None,
    energy: str | None = None,
    batch: str | None = None,
    **rest: Any,
) -> Request:
    """The command line's words -> Request. Raises UserError for what is no quantity, or an absurd one."""
    devices = None if gpus is None else parse_count(gpus, "--gpus")
    sequences = None if batch is None else parse_count(batch, "--batch")
    for name, value in (("--gpus", devices), ("--batch", sequences)):
        if value is not None and (value != int(value) or value > MOST_DEVICES):
            raise UserError(f"{name} {value:g} is no whole number up to {MOST_DEVICES:,}")
    count = None if tokens is None else parse_count(tokens, "--tokens")
    if count is not None and not 1 <= count <= 1e18:
        raise UserError(f"--tokens {tokens} is absurd: all text ever written is below 1e16 tokens")
    return Request(
        gpu=gpu,
        model=model,
        tokens=count,
        gpus=None if devices is None else int(devices),
        budget_usd=None if budget is None else parse_dollars(budget, "--budget"),
        deadline_seconds=None if deadline is None else parse_seconds(deadline, "--deadline"),
        energy_mwh=None if energy is None else parse_megawatt_hours(energy, "--energy"),
        batch=None if sequences is None else int(sequences),
        **rest,
    )


def make_plan(request: Request) -> dict[str, Any]:
    """The plan as plain values, for `baleen cost plan --json`.

    Raises UserError for what cannot run: it names the fault, by how much, and the nearest that can.
    """
    facts = load_assumptions(find_hardware(request.gpu, *request.hardware_files), request.sets)
    prices = device_prices(facts, request.usd_per_hour)
    chosen, tokens, solved = _solve(request, facts, prices)
    return _report(request, facts, prices, chosen, tokens, solved)


def _solve(request: Request, facts: Assumptions, prices: Prices) -> tuple[Chosen, float, dict[str, Any]]:
    """Model, devices and tokens: those given, the rest from budget, energy and deadline."""
    limits = [request.budget_usd and request.budget_usd / prices.mid]
    if request.energy_mwh:
        if prices.mwh is None:
            raise UserError(f"the watts of {facts.hardware.title} are not in the table: --energy cannot be solved for")
        limits.append(request.energy_mwh / prices.mwh)
    if request.deadline_seconds and request.gpus:
        limits.append(request.deadline_seconds / 3600 * request.gpus)
    hours = min((limit for limit in limits if limit), default=None)

    model = None if request.model is None else load_model(request.model)
    tokens = request.tokens
    if tokens is None and hours is None and not request.deadline_seconds:
        tokens = model.tokens if model else None
        if tokens is None:
            raise UserError("how many tokens? Give --tokens N, or a --budget, --deadline or --energy to solve for them")
    if hours is None and request.gpus is None:
        if model is None or tokens is None or not request.deadline_seconds:
            raise UserError("how many devices? Give --gpus N, or a --budget or --energy, or a --deadline with --tokens")
        chosen = _fewest_devices(request, facts, model, tokens, request.deadline_seconds)
        return chosen, tokens, {"gpus": f"the fewest that meet the deadline: {chosen.gpus}"}

    solved: dict[str, Any] = {}
    gpus = request.gpus
    if gpus is None:
        assert hours is not None
        days = request.deadline_seconds / 86400 if request.deadline_seconds else USUAL_DAYS
        gpus = _round_devices(hours / 24 / days, facts.hardware.domain)
        if gpus > MOST_DEVICES:
            raise UserError(
                f"{hours:.3g} device-hours in {days:g} days take {gpus:,} devices; a plan reaches {MOST_DEVICES:,}: "
                "give a later --deadline or a smaller budget"
            )
        solved["gpus"] = f"{gpus}, so that {hours:,.0f} device-hours take at most {days:g} days"
    if model is None:
        if hours is None:
            raise UserError(
                "which model? Give --model NAME, or a --budget, --energy or --deadline to size one by a law"
            )
        model, allocation = _size_by_law(request, facts, gpus, hours)
        law = allocation.law
        solved["model"] = f"{model.name}, " + (
            f"by the law {law.name}: {law.source}"
            if tokens is None
            else f"what the hours leave for {tokens:.3g} tokens"
        )
        solved["law"] = {
            "flops_per_token": allocation.flops_per_token,
            "tokens": allocation.tokens,
            "source": law.source,
        }
    chosen = _choose(request, facts, model, gpus)
    if tokens is None:
        assert hours is not None
        tokens = hours * 3600 * chosen.tokens_per_second / gpus
        solved["tokens"] = f"what {hours:,.0f} device-hours train"
    return chosen, tokens, solved


def _choose(request: Request, facts: Assumptions, model: PlannedModel, gpus: int) -> Chosen:
    """The layout of a model on `gpus` devices: the one asked for, the published one, or the best of a search."""
    on = _conditions(request, facts, model)
    stated, how = StatedLayout(), "the fastest of all that fit"
    if request.layout is not None:
        stated, how = user_layout(request.layout), "as asked for; what it leaves open, the fastest that fits"
    elif not request.search and model.name in PUBLISHED_LAYOUTS:
        text, source = PUBLISHED_LAYOUTS[model.name]
        if search_layouts(model, gpus, on, facts.calibration, user_layout(text), top=1).best:
            stated, how = user_layout(text), source
    found = search_layouts(model, gpus, on, facts.calibration, stated, top=5 if request.search else 1)
    if not found.tried:
        raise explain_no_layout(model, gpus, on, stated)
    if not found.best:
        assert found.leanest is not None
        raise _too_large(facts, model, gpus, on, stated, *found.leanest)
    goodput = expected_goodput(gpus, facts.reliability)
    rate = on.batch * on.seq_len / found.best[0].step.seconds * goodput
    return Chosen(model, gpus, on, found.best, how, rate, goodput)


def _conditions(request: Request, facts: Assumptions, model: PlannedModel) -> Conditions:
    hardware = facts.hardware
    precision = request.precision or next(
        name for name, peak in (("fp8", hardware.peak_fp8), ("bf16", hardware.peak_bf16), ("fp32", 1)) if peak
    )
    hardware.peak_flops(precision)  # raises UserError where the device has no such format
    seq_len = request.seq_len or model.seq_len
    if seq_len < 1:
        raise UserError(f"--seq {seq_len} is no sequence length: give at least 1")
    batch = request.batch or (model.batch if seq_len == model.seq_len else usual_batch(seq_len))
    return Conditions(
        hardware=hardware,
        precision=precision,
        seq_len=seq_len,
        batch=batch,
        mtp=model.arch.num_nextn_predict_layers > 0,
    )


def _too_large(
    facts: Assumptions,
    model: PlannedModel,
    gpus: int,
    on: Conditions,
    stated: StatedLayout,
    needed: float,
    leanest: object,
) -> UserError:
    """By how much nothing fits, and the nearest that does: another layout of these devices, or more of them."""
    room = on.hardware.memory_gb * 1e9 * MEMORY_SHARE
    near = f"no number of them up to {MOST_DEVICES:,} holds it; take devices with more memory or a smaller model"
    tries = [(gpus, StatedLayout())]
    tries += [(gpus * 2**k, wanted) for k in range(1, 18) for wanted in (stated, StatedLayout())]
    for count, wanted in tries:
        if count <= MOST_DEVICES and (best := search_layouts(model, count, on, facts.calibration, wanted, top=1).best):
            near = f"the nearest that fits is {best[0].layout} on {count} of them"
            break
    return UserError(
        f"{model.name} does not fit {gpus} x {on.hardware.title}: the leanest layout, {leanest}, needs "
        f"{needed / 1e9:.1f} GB a device, {(needed - room) / 1e9:.1f} GB more than the {room / 1e9:.1f} GB that may be "
        f"filled; {near}"
    )


def _fewest_devices(request: Request, facts: Assumptions, model: PlannedModel, tokens: float, seconds: float) -> Chosen:
    """The smallest power of two of nodes that trains `tokens` in `seconds`."""
    on = _conditions(request, facts, model)
    flops = training_flops(model.arch, on.seq_len) * tokens
    count = _round_devices(flops / on.hardware.peak_flops(on.precision) / seconds, on.hardware.domain)
    fault: UserError | None = None
    while count <= MOST_DEVICES:
        try:
            chosen = _choose(request, facts, model, count)
            if tokens / chosen.tokens_per_second <= seconds:
                return chosen
        except UserError as error:  # does not divide or fit at this size: a larger one may
            fault = error
        count *= 2
    raise UserError(
        f"{model.name} with {tokens:.3g} tokens cannot be trained in {seconds / 86400:g} days on up to "
        f"{MOST_DEVICES:,} x {on.hardware.title}: take fewer tokens or a later deadline"
        + (f" ({fault})" if fault else "")
    )


def _size_by_law(request: Request, facts: Assumptions, gpus: int, hours: float) -> tuple[PlannedModel, Allocation]:
    """The V3-shaped model and tokens that a scaling law takes for a budget of device-hours; given tokens stay.

    The compute a budget buys depends on how fast the model runs, and that on its size: solved by repetition.
    """
    seq_len = request.seq_len or 4096
    rate = facts.hardware.peak_flops(request.precision or "bf16") * 0.35  # FLOP/s a device, replaced in the first round
    for _ in range(6):
        compute = rate * hours * 3600
        allocation = allocate(compute, request.law)
        if request.tokens is not None:
            allocation = allocation._replace(flops_per_token=compute / request.tokens, tokens=request.tokens)
        arch = v3_shaped_for(allocation.flops_per_token, seq_len)
        model = PlannedModel(f"V3-shaped, {arch.hidden_size} wide", arch, seq_len, usual_batch(seq_len), None, None)
        chosen = _choose(request, facts, model, gpus)
        before, rate = rate, chosen.tokens_per_second * training_flops(arch, seq_len) / gpus
        if abs(rate / before - 1) < 0.02:
            break
    return model, allocation


def _round_devices(wanted: float, domain: int) -> int:
    """Up to a power of two of nodes: layouts divide those best."""
    return domain * 2 ** max(0, math.ceil(math.log2(max(wanted, 1e-9) / domain) - 1e-9))


def _report(
    request: Request, facts: Assumptions, prices: Prices, chosen: Chosen, tokens: float, solved: dict[str, Any]
) -> dict[str, Any]:
    model, on, best = chosen.model, chosen.on, chosen.layouts[0]
    work = workload(model, best.layout, on)
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
        "inference": serving_cost(model.arch, on.hardware, on.precision, prices[:3], facts.serving),
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
