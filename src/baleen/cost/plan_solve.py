"""Solves a plan for what is not given: tokens, devices or the model itself, from a budget, a deadline or an energy."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

from baleen.config import UserError
from baleen.cost.architecture import Architecture
from baleen.cost.assumptions import Assumptions
from baleen.cost.cases import NODE_LIMITS
from baleen.cost.flops import training_flops
from baleen.cost.plan_layout import Chosen, can_run, choose, conditions
from baleen.cost.plan_money import Prices
from baleen.cost.plan_request import MOST_DEVICES, Request
from baleen.cost.planned_model import PlannedModel, load_model, usual_batch
from baleen.cost.scaling import WIDTHS, allocate, v3_shaped, v3_shaped_for

USUAL_DAYS = 30.0  # of a run, where a budget is given and no deadline


def solve(request: Request, facts: Assumptions, prices: Prices) -> tuple[Chosen, float, dict[str, Any]]:
    """Model, devices and tokens: those given, the rest from budget, energy and deadline."""
    limits = [request.budget_usd and request.budget_usd / prices.mid]
    if request.energy_mwh:
        if prices.mwh is None:
            raise UserError(f"the watts of {facts.hardware.title} are not in the table: --energy cannot be solved for")
        limits.append(request.energy_mwh / prices.mwh)
    if request.deadline_seconds and request.gpus:
        limits.append(request.deadline_seconds / 3600 * request.gpus)
    hours = min((limit for limit in limits if limit), default=None)

    if request.law is not None and request.model is not None:
        raise UserError("--law sizes a model, and --model names one: leave one out")
    if request.law is not None and request.tokens is not None:
        raise UserError("--law shares the compute out between size and tokens, and --tokens fixes these: leave one out")
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
        return chosen, tokens, {"gpus": f"the smallest power of two of nodes that meets the deadline: {chosen.gpus}"}

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
        chosen, said = _size_by_law(request, facts, gpus, hours)
        solved |= said
    else:
        chosen = choose(request, facts, model, gpus)
    if tokens is None:
        assert hours is not None
        tokens = hours * 3600 * chosen.tokens_per_second / gpus
        solved["tokens"] = f"what {hours:,.0f} device-hours train"
    return chosen, tokens, solved


def _fewest_devices(request: Request, facts: Assumptions, model: PlannedModel, tokens: float, seconds: float) -> Chosen:
    """The smallest power of two of nodes that trains `tokens` in `seconds`."""
    on = conditions(request, facts, model)
    flops = training_flops(model.arch, on.seq_len) * tokens
    count = _round_devices(flops / on.hardware.peak_flops(on.precision) / seconds, on.hardware.domain)
    fault: UserError | None = None
    while count <= MOST_DEVICES:
        try:
            chosen = choose(request, facts, model, count)
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


def _size_by_law(request: Request, facts: Assumptions, gpus: int, hours: float) -> tuple[Chosen, dict[str, Any]]:
    """The V3-shaped model that a scaling law takes for a budget of device-hours, or that given tokens leave hours for.

    The compute a budget buys depends on how fast the model runs, and that on its size: solved by repetition. Where it
    does not fit the devices, the widest that does is taken. Returned with what is said of it.
    """
    seq_len = request.seq_len or 4096
    precision = request.precision or facts.hardware.fastest_precision
    rate = facts.hardware.peak_flops(precision) * 0.35  # FLOP/s a device, replaced in the first round
    for _ in range(6):
        compute = rate * hours * 3600
        allocation = allocate(compute, request.law or "deepseek")
        if request.tokens is not None:
            allocation = allocation._replace(flops_per_token=compute / request.tokens, tokens=request.tokens)
        wanted = _v3_shaped(v3_shaped_for(allocation.flops_per_token, seq_len), seq_len)
        fitting = can_run(request, facts, wanted, gpus)
        model = wanted if fitting else _widest(request, facts, gpus, wanted)
        chosen = choose(request, facts, model, gpus)
        before, rate = rate, chosen.tokens_per_second * training_flops(model.arch, seq_len) / gpus
        if abs(rate / before - 1) < 0.02:
            break
    law = allocation.law
    how = f"by the law {law.name}: {law.source}"
    if request.tokens is not None:
        how = f"what the hours leave for {request.tokens:.3g} tokens"
    if not fitting:
        how = f"the widest that fits {gpus} devices; {wanted.arch.hidden_size} wide would be {how}"
    said: dict[str, Any] = {"model": f"{model.name}, {how}"}
    if request.tokens is None:
        flops = allocation.flops_per_token
        said["law"] = {"flops_per_token": flops, "tokens": allocation.tokens, "source": law.source}
    return chosen, said


def _v3_shaped(arch: Architecture, seq_len: int) -> PlannedModel:
    name, node_limit = f"V3-shaped, {arch.hidden_size} wide", NODE_LIMITS["dsv3"]
    return PlannedModel(name, arch, seq_len, usual_batch(seq_len), None, node_limit)


def _widest(request: Request, facts: Assumptions, gpus: int, too_wide: PlannedModel) -> PlannedModel:
    """The widest V3-shaped model below `too_wide` with a layout that fits; the narrowest of all if none has one."""
    widths = range(WIDTHS.start, too_wide.arch.hidden_size, WIDTHS.step)
    models = [_v3_shaped(v3_shaped(width), too_wide.seq_len) for width in widths] or [too_wide]
    fitting = bisect_left(models, True, key=lambda model: not can_run(request, facts, model, gpus))
    return models[max(0, fitting - 1)]


def _round_devices(wanted: float, domain: int) -> int:
    """Up to a power of two of nodes: layouts divide those best."""
    return domain * 2 ** max(0, math.ceil(math.log2(max(wanted, 1e-9) / domain) - 1e-9))
