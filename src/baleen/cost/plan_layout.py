"""The layout of a planned model on a number of devices: the one asked for, the published one, or the fastest."""

from __future__ import annotations

from typing import NamedTuple

from baleen.config import UserError
from baleen.cost.assumptions import Assumptions
from baleen.cost.failures import expected_goodput
from baleen.cost.layout import StatedLayout
from baleen.cost.plan_request import MOST_DEVICES, Request
from baleen.cost.planned_model import PlannedModel, usual_batch
from baleen.cost.ranking import Candidate
from baleen.cost.search import Conditions, explain_no_layout, fits, search_layouts, user_layout

# Layouts that the authors of a model published, taken where neither --layout nor --search asks for another.
PUBLISHED_LAYOUTS = {
    "v3-671b": ("PP16,EP64,ZeRO1,dualpipe,recompute-deepseek", "as published: arXiv 2412.19437 §3.2"),
    "dsv3": ("PP16,EP64,ZeRO1,dualpipe,recompute-deepseek", "as published: arXiv 2412.19437 §3.2"),
}


class Chosen(NamedTuple):
    """A model on a number of devices with its layouts, best first, and why the first was taken."""

    model: PlannedModel
    gpus: int
    on: Conditions
    layouts: list[Candidate]
    layout_from: str
    tokens_per_second: float  # of the whole run, goodput included
    goodput: float


def choose(request: Request, facts: Assumptions, model: PlannedModel, gpus: int) -> Chosen:
    """The layout of a model on `gpus` devices: the one asked for, the published one, or the best of a search."""
    on = conditions(request, facts, model)
    stated, how = _stated(request, model, gpus, on)
    found = search_layouts(model, gpus, on, facts.calibration, stated, top=5 if request.search else 1)
    if not found.tried:
        raise explain_no_layout(model, gpus, on, stated)
    if not found.best:
        assert found.leanest is not None
        raise _too_large(facts, model, gpus, on, stated, found.leanest)
    goodput = expected_goodput(gpus, facts.reliability)
    if not goodput:
        mtbf = facts.reliability.mtbf_seconds(gpus)
        raise UserError(
            f"{gpus:,} devices fail every {mtbf:.2g} s on average, before a checkpoint: the run would never end; "
            "take fewer of them, or other factors of reliability"
        )
    rate = on.batch * on.seq_len / found.best[0].step.seconds * goodput
    return Chosen(model, gpus, on, found.best, how, rate, goodput)


def can_run(request: Request, facts: Assumptions, model: PlannedModel, gpus: int) -> bool:
    """Whether `choose` would find a layout: much faster than asking it, for nothing is timed."""
    on = conditions(request, facts, model)
    return fits(model, gpus, on, _stated(request, model, gpus, on)[0])


def _stated(request: Request, model: PlannedModel, gpus: int, on: Conditions) -> tuple[StatedLayout, str]:
    """What is fixed of the layout before any search, and who fixed it."""
    if request.layout is not None:
        return user_layout(request.layout), "as asked for; what it leaves open, the fastest that fits"
    if on.hardware.is_cpu:
        as_trained = StatedLayout(zero=0, recompute="none", micro_batch=model.micro_batch)
        return as_trained, "as Baleen trains on one machine"
    if not request.search and model.name in PUBLISHED_LAYOUTS:
        text, source = PUBLISHED_LAYOUTS[model.name]
        if fits(model, gpus, on, user_layout(text)):
            return user_layout(text), source
    return StatedLayout(), "the fastest of all that fit"


def conditions(request: Request, facts: Assumptions, model: PlannedModel) -> Conditions:
    hardware = facts.hardware
    precision = request.precision or hardware.fastest_precision
    hardware.peak_flops(precision)  # raises UserError where the device has no such format
    seq_len = request.seq_len or model.seq_len
    if seq_len < 1:
        raise UserError(f"--seq-len {seq_len} is no sequence length: give at least 1")
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
    leanest: Candidate,
) -> UserError:
    """By how much nothing fits, and the nearest that does: another layout of these devices, or more of them."""
    room, needed = on.hardware.fillable_bytes, leanest.memory.total
    near = f"no number of them up to {MOST_DEVICES:,} holds it; take devices with more memory or a smaller model"
    wishes = [stated] if stated == StatedLayout() else [stated, StatedLayout()]
    tries = [(gpus * 2**k, wanted) for k in range(18) for wanted in wishes if gpus * 2**k <= MOST_DEVICES]
    for count, wanted in tries:
        if fits(model, count, on, wanted):
            best = search_layouts(model, count, on, facts.calibration, wanted, top=1).best[0]
            near = f"the nearest that fits is {best.layout} on {count} of them"
            break
    return UserError(
        f"{model.name} does not fit {gpus} x {on.hardware.title}: the leanest layout, {leanest.layout}, needs "
        f"{needed / 1e9:.1f} GB a device, {(needed - room) / 1e9:.1f} GB more than the {room / 1e9:.1f} GB that may be "
        f"filled; {near}"
    )
