"""The best layouts for a run: every layout that divides and fits, ranked by the step time its chain predicts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from baleen.config import Strict, UserError
from baleen.cost.calibration import Calibration
from baleen.cost.candidates import PIPELINES, RECOMPUTE, candidate_layouts
from baleen.cost.hardware import Hardware
from baleen.cost.layout import Layout, Schedule, StatedLayout, make_layout
from baleen.cost.planned_model import PlannedModel
from baleen.cost.ranking import RISING_RECOMPUTATION, Found, memory_of, rank
from baleen.cost.schedule import check_counts
from baleen.cost.workload import Workload

LEANEST_RECOMPUTATION = RISING_RECOMPUTATION[-1]
# Schedules that the search tries where none is stated; plain 1F1B and interleaving come with "1f1b".
SCHEDULES: tuple[Schedule, ...] = ("1f1b", "zb1p", "dualpipe", "dualpipev")
LAYOUT_WORDS = (
    r"(?P<degree>TP|PP|CP|EP|VP|DP)(?P<number>\d+)", r"ZeRO-?(?P<zero>[0-3])", r"(?P<fsdp>FSDP)", r"(?P<ddp>DDP)",
    r"(?P<schedule>1f1b|interleaved|zb1p|dualpipev|dualpipe)",
    r"recompute-(?P<recompute>none|selective|operators|deepseek|modules|full)",
)  # fmt: skip
DEGREES = {
    "TP": "tensor", "PP": "pipeline", "CP": "context", "EP": "expert", "VP": "virtual_stages", "DP": "data",
}  # fmt: skip


class Conditions(Strict):
    """What a layout is searched for, the devices apart."""

    hardware: Hardware
    precision: str
    seq_len: int
    batch: int  # sequences
    mtp: bool


def user_layout(text: str) -> StatedLayout:
    """ "PP16,EP64,ZeRO1,DualPipe" -> what it states; degrees left out are 1. Raises UserError on an unknown word."""
    fields: dict[str, object] = {}
    for word in re.split(r"[\s,]+", text.strip()):
        match = next((m for pattern in LAYOUT_WORDS if (m := re.fullmatch(pattern, word, re.I))), None)
        if match is None:
            raise UserError(
                f"--layout: {word!r} is no part of a layout: write TPn, PPn, CPn, EPn, VPn, DPn, ZeRO0 to ZeRO3, FSDP, "
                "1f1b, interleaved, zb1p, dualpipe, dualpipev, or recompute-none, -operators, -deepseek, "
                "-modules, -full"
            )
        found = {name: value for name, value in match.groupdict().items() if value is not None}
        if "degree" in found:
            fields[DEGREES[found["degree"].upper()]] = _at_least_one(word, found["number"])
        elif "zero" in found:
            fields["zero"] = int(found["zero"])
        elif "fsdp" in found or "ddp" in found:
            fields["zero"] = 3 if "fsdp" in found else 0
        else:
            fields.update({name: value.lower() for name, value in found.items()})
    if isinstance(pipeline := fields.get("pipeline"), int) and pipeline > 1 and fields.get("zero") == 3:
        raise UserError(
            "--layout: FSDP under a pipeline gathers every weight for every micro-batch: take ZeRO1 with PP"
        )
    if fields.get("virtual_stages", 1) != 1 and fields.setdefault("schedule", "interleaved") != "interleaved":
        raise UserError(f"--layout: VPn is for the interleaved schedule: leave it out with {fields['schedule']}")
    stated = StatedLayout.model_validate(fields)
    if stated.states_degrees and (stated.pipeline or 1) == 1 and stated.schedule not in (None, "1f1b"):
        raise UserError(
            f"--layout: {stated.schedule} is a schedule of a pipeline: add PPn, such as PP8, or leave it out"
        )
    return stated


def workload(model: PlannedModel, layout: Layout, on: Conditions) -> Workload:
    return Workload(
        arch=model.arch,
        hardware=on.hardware,
        layout=layout,
        precision=on.precision,
        seq_len=on.seq_len,
        global_batch=on.batch,
        mtp=on.mtp,
        node_limit=model.node_limit,
    )


def search_layouts(
    model: PlannedModel,
    devices: int,
    on: Conditions,
    calibration: Calibration,
    stated: StatedLayout | None = None,
    top: int = 5,
) -> Found:
    """Ranks every layout that keeps what is `stated`, divides devices, batch and experts, and fits into memory."""
    layouts = divisible_layouts(model, devices, on, stated or StatedLayout())
    return rank((workload(model, layout, on) for layout in layouts), calibration, top)


def fits(model: PlannedModel, devices: int, on: Conditions, stated: StatedLayout) -> bool:
    """Whether any layout that keeps what is stated fits into memory. No time is computed: the leanest layouts do."""
    lean = stated.model_copy(
        update={"micro_batch": stated.micro_batch or 1, "recompute": stated.recompute or LEANEST_RECOMPUTATION}
    )
    works = (workload(model, layout, on) for layout in divisible_layouts(model, devices, on, lean))
    memories = (memory_of(work) for work in works)
    return any(memory.total <= on.hardware.fillable_bytes for memory in memories if memory)


def divisible_layouts(model: PlannedModel, devices: int, on: Conditions, stated: StatedLayout) -> Iterator[Layout]:
    """Layouts without repetition that the schedules can run and over which batch, heads and experts divide."""
    seen = set()
    schedules = (stated.schedule,) if stated.schedule else SCHEDULES
    recomputes = (stated.recompute,) if stated.recompute else RECOMPUTE
    for schedule in schedules:
        for recompute in recomputes:
            fixed = stated.model_copy(
                update={
                    "recompute": recompute,
                    "schedule": None if schedule == "1f1b" and not stated.schedule else schedule,
                }
            )
            for layout in candidate_layouts(model.arch, on.hardware, devices, on.batch, fixed):
                if layout.pipeline == 1:
                    if stated.schedule not in (None, "1f1b"):
                        continue
                    layout = layout.model_copy(update={"schedule": "1f1b", "virtual_stages": 1})
                if stated.data not in (None, layout.data):
                    continue
                if layout not in seen and not _obstacle(model, layout, on):
                    seen.add(layout)
                    yield layout


def explain_no_layout(model: PlannedModel, devices: int, on: Conditions, stated: StatedLayout) -> UserError:
    """Why nothing divides, and the nearest numbers that would."""
    for name, of, number in (
        ("tensor", "devices", devices),
        ("pipeline", "devices", devices),
        ("context", "devices", devices),
        ("expert", "ranks of a pipeline stage", devices // (stated.pipeline or 1)),
    ):
        degree = getattr(stated, name) or 1
        if number % degree:
            short = next(key for key, value in DEGREES.items() if value == name)
            return UserError(
                f"layout: {number} {of} do not divide over {short}{degree}; the nearest that does is "
                f"{short}{_nearest_divisor(number, degree)}"
            )
    degrees = {
        name: value
        for name, value in stated.model_dump(exclude_none=True).items()
        if name not in ("compiled", "sequence_parallel", "data")
    }
    try:
        layout = make_layout(devices, **degrees)
    except UserError as error:
        return error
    if stated.data and stated.data != layout.data:
        cut = devices // layout.data
        return UserError(
            f"layout: DP{stated.data} on {devices} devices does not go with the other degrees, which leave "
            f"DP{layout.data}; the nearest number of devices that does is {stated.data * cut}"
        )
    if stated.states_degrees and (obstacle := _obstacle(model, layout, on)):
        return UserError(f"layout: {obstacle}")
    unit = on.hardware.domain
    rounded = devices - devices % unit
    near = next(
        (
            n
            for step in range(0, max(2 * unit, devices // 2), unit)
            for n in (rounded - step, rounded + step)
            if n > 0 and _batch_divides(on.batch, n, stated) and next(divisible_layouts(model, n, on, stated), None)
        ),
        None,
    )
    return UserError(
        f"no layout divides {devices} devices and a batch of {on.batch} sequences"
        + (f"; the nearest number of devices with one is {near}" if near else ": change the batch with --batch")
    )


def _batch_divides(batch: int, devices: int, stated: StatedLayout) -> bool:
    """Whether any number of ranks can share a sequence on these devices: a cheap test before layouts are listed."""
    cuts = [stated.tensor or 1] if stated.states_degrees else [1, 2, 4, 8]
    pipelines = [stated.pipeline or 1] if stated.states_degrees else PIPELINES
    shares = {tensor * pipeline * (stated.context or 1) for tensor in cuts for pipeline in pipelines}
    return any(devices % share == 0 and batch % (devices // share) == 0 for share in shares)


def _obstacle(model: PlannedModel, layout: Layout, on: Conditions) -> str | None:
    """What keeps a layout from running, and the nearest that runs; None if nothing does."""
    arch = model.arch
    if arch.is_moe and arch.n_routed_experts % layout.expert:
        return (
            f"{arch.n_routed_experts} experts do not divide over EP{layout.expert}; the nearest that does is "
            f"EP{_nearest_divisor(arch.n_routed_experts, layout.expert)}"
        )
    if layout.expert > 1 and not arch.is_moe:
        return f"EP{layout.expert} spreads experts, and the model has none; leave EP out"
    if arch.num_attention_heads % layout.tensor:
        return (
            f"{arch.num_attention_heads} heads do not divide over TP{layout.tensor}; the nearest that does is "
            f"TP{_nearest_divisor(arch.num_attention_heads, layout.tensor)}"
        )
    if layout.chunks > arch.num_hidden_layers:
        most = arch.num_hidden_layers * layout.pipeline // layout.chunks
        return f"{layout.chunks} stages are more than {arch.num_hidden_layers} layers; take at most PP{most}"
    try:
        count = layout.micro_batches(on.batch)
        if layout.pipeline > 1:
            check_counts(layout.schedule, layout.pipeline, count)
    except UserError as error:
        return str(error)
    return None


def _nearest_divisor(number: int, target: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - target))


def _at_least_one(word: str, number: str) -> int:
    if int(number) < 1:
        raise UserError(f"--layout: {word} is no degree: take 1 or more")
    return int(number)
