"""Time of a training step as a chain: ideal -> kernels -> exposed communication -> bubble -> imbalance and jitter.

Each link is a function of rooflines (`baleen.cost.kernels`), byte counts (`baleen.cost.traffic`), the executed
schedule (`baleen.cost.simulator`) and the few factors of `baleen.cost.calibration`; goodput closes the chain of a run.
Times are seconds of one step on the average rank unless a name says otherwise.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from pydantic import Field

from baleen.config import Positive, Strict, UserError
from baleen.cost import kernels, traffic
from baleen.cost.architecture import Architecture
from baleen.cost.calibration import Calibration
from baleen.cost.flops import forward_flops, model_flops_utilization, training_flops
from baleen.cost.hardware import Hardware
from baleen.cost.kernels import Attention, Kernels, Seconds
from baleen.cost.layout import Layout
from baleen.cost.memory import stage_parameters
from baleen.cost.schedule import interleaved_1f1b, schedule
from baleen.cost.simulator import Durations, execute

LINK_SHARE = 0.8  # of a link's rate that collectives reach: 160 of 200 GB/s on H800, 40 of 50 on IB (2505.09343 §4)
# V3 gives 20 of an H800's 132 SMs to communication, which DualPipe then hides (2412.19437 §3.2.2).
OVERLAPPED_SCHEDULES = ("dualpipe", "dualpipev")
COMPUTE_SHARE_WHEN_OVERLAPPED = 112 / 132
DEVICES_PER_NODE = 8


class Workload(Strict):
    """One training step of a network on devices. `global_batch` in sequences."""

    arch: Architecture
    hardware: Hardware
    layout: Layout
    precision: str = "bf16"
    seq_len: Positive
    global_batch: Positive
    mtp: bool = False  # whether the MTP modules train along
    attention: Attention = "native"
    eager: bool = False  # operator by operator: neither compiled nor with a framework's fused kernels
    balanced_routing: bool = False  # experts forced to equal load, as in benchmarks
    node_limit: int | None = Field(None, ge=1)  # most nodes a token is sent to (V3: 4)

    @property
    def tokens(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def micro_batches(self) -> float:
        """Micro-batches of one pipeline; a fraction where a published batch does not divide."""
        return max(1.0, self.global_batch / (self.layout.data * self.layout.micro_batch))


class Traffic(NamedTuple):
    """Seconds on the links per step and rank, as if nothing were hidden."""

    tensor: float
    expert: float
    data: float
    pipeline: float
    context: float


class Rooflines(NamedTuple):
    """All that does not depend on calibration."""

    ideal: float
    kernels: Kernels  # one micro-batch, one rank, recomputation in the backward
    optimizer: float
    traffic: Traffic
    stage_imbalance: float  # fullest pipeline chunk over the mean


class Link(NamedTuple):
    """One link: the step's seconds after it, and what it added."""

    name: str
    seconds: float
    added: float
    factor: float


class StepTime(NamedTuple):
    """A predicted step. `phases` breaks the seconds down by cause; `chain` is cumulative."""

    chain: tuple[Link, ...]
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.chain[-1].seconds


def rooflines(work: Workload) -> Rooflines:
    """Rooflines and byte counts of a workload: everything before calibration."""
    arch, layout, hardware = work.arch, work.layout, work.hardware
    stages = layout.pipeline
    modules = arch.num_nextn_predict_layers if work.mtp else 0
    mtp_moe = arch.mtp_moe_modules if work.mtp else 0
    total = kernels.NOTHING
    for moe, layers in ((False, arch.dense_layers + modules - mtp_moe), (True, arch.moe_layers + mtp_moe)):
        if layers:
            layer = kernels.layer_kernels(
                arch, layout, hardware, work.precision, seq_len=work.seq_len, moe=moe, attention=work.attention
            )
            total += _with_recomputation(layer, work).times(layers)
    ends = kernels.ends_kernels(arch, layout, hardware, work.precision, work.seq_len, work.mtp)
    layer_time = sum(busy(total)) / (arch.num_hidden_layers + modules)
    imbalance = stage_imbalance(layout, arch.num_hidden_layers + modules, sum(busy(ends)) / layer_time)
    held = stage_parameters(
        arch, layout, arch.num_hidden_layers / stages, ends=min(2, 2 / stages), mtp=modules / stages
    )
    return Rooflines(
        ideal=ideal_seconds(work),
        kernels=(total + ends).times(1 / stages),
        optimizer=kernels.optimizer_seconds(hardware, held, layout, work.precision, layout.expert_replicas),
        traffic=_traffic(work, held),
        stage_imbalance=imbalance,
    )


def ideal_seconds(work: Workload) -> float:
    """Every counted FLOP at the dense peak of its format: linear layers in theirs, scores, router and head in BF16."""
    parts = forward_flops(work.arch, work.seq_len, mtp=work.mtp)
    core = "fp32" if work.precision == "fp32" else "bf16"
    in_core = parts["scores"] + parts["head"] + parts.get("router", 0.0)
    in_linear = sum(parts.values()) - in_core
    rate = in_linear / work.hardware.peak_flops(work.precision) + in_core / work.hardware.peak_flops(core)
    return 3 * rate * work.tokens / work.layout.devices


def kernel_seconds(roof: Rooflines, work: Workload, calibration: Calibration) -> Kernels:
    """Kernels of one micro-batch with products and streaming kernels as fast as they are inside real training."""
    generation = f"matmul_{work.hardware.generation}"
    slower = calibration.get(generation, 1.0)
    if work.precision == "fp8":
        slower *= calibration["matmul_fp8"]
    elementwise = calibration["elementwise"] * (calibration["eager"] if work.eager else 1.0)
    k = roof.kernels
    scaled = Kernels(
        matmul=k.matmul.times(slower),
        grouped=k.grouped.times(slower * calibration["grouped"]),
        attention=k.attention.times(calibration["attention"]),
        elementwise=k.elementwise.times(elementwise),
        weight_gradient=k.weight_gradient * slower,
    )
    if work.arch.is_moe and work.layout.schedule in OVERLAPPED_SCHEDULES and work.layout.expert > 1:
        scaled = scaled.times(1 / COMPUTE_SHARE_WHEN_OVERLAPPED)
    return scaled


def exposed_seconds(roof: Rooflines, work: Workload, calibration: Calibration, compute: float) -> dict[str, float]:
    """Communication per step that compute of `compute` seconds does not hide, by kind."""
    t = roof.traffic
    hidden = work.layout.schedule in OVERLAPPED_SCHEDULES and work.layout.pipeline > 1
    return {
        "tensor": t.tensor * min(1.0, calibration["tensor_exposed"]),
        "expert": _exposed(t.expert, 0.0 if hidden else calibration["expert_exposed"], compute),
        "data": _exposed(t.data, calibration["data_exposed"], compute),
        "pipeline": _exposed(t.pipeline, 0.0, compute),
        "context": _exposed(t.context, 0.0, compute),
    }


def bubble_seconds(layout: Layout, micro_batches: float, forward: float, backward: float, weight: float) -> float:
    """Seconds of a step in which the average rank waits, from the executed schedule.

    forward, backward (whole) and weight: one micro-batch on one rank. Once the pipe is full, more micro-batches do not
    change the bubble, so no more than two rounds are executed; times are rounded to a fifth of a forward.
    """
    if layout.pipeline == 1:
        return 0.0
    split = layout.schedule not in ("1f1b", "interleaved")  # only then does it matter what part of B is for the weights
    unit = bubble_of(
        layout.schedule,
        layout.pipeline,
        layout.virtual_stages,
        max(1, math.ceil(micro_batches)),
        round(5 * backward / forward) / 5,
        round(weight / forward, 1) if split else 0.0,
    )
    return unit * forward


@cache
def bubble_of(name: str, ranks: int, virtual: int, micro_batches: int, backward: float, weight: float) -> float:
    """Mean bubble of a rank in units of its forward of one micro-batch. Raises UserError as the schedule does."""
    rounds = min(micro_batches, 2 * ranks)
    if virtual > 1 and name in ("1f1b", "interleaved"):
        rounds = math.ceil(rounds / ranks) * ranks
        order = interleaved_1f1b(ranks, rounds, virtual)
    else:
        if name in OVERLAPPED_SCHEDULES:
            rounds = max(2 * ranks, rounds + rounds % 2)
        order = schedule(name, ranks, rounds)
    stages = 1 + max(op.stage for rank in order for action in rank for op in action)
    share = ranks / stages  # of a rank's forward that one stage takes
    timeline = execute(order, Durations(share, share * backward, share * min(weight, backward)))
    return sum(timeline.bubble_seconds) / ranks


def phase_seconds(work: Workload, calibration: Calibration) -> dict[str, float]:
    """Seconds an average rank spends by phase of the executed schedule: F, B, I, W, F&B (overlapped), bubble, and
    the optimizer; as arXiv 2505.09343 table 4 breaks down V3's step. Imbalance and jitter stretch all but the last.
    """
    roof = rooflines(work)
    k = kernel_seconds(roof, work, calibration)
    forward, backward = busy(k)
    layout, count = work.layout, math.ceil(work.micro_batches)
    timeline = execute(
        schedule(layout.schedule, layout.pipeline, count), Durations(forward, backward, k.weight_gradient)
    )
    totals: dict[str, float] = {}
    for rank in range(layout.pipeline):
        for kind, seconds in timeline.seconds_by_kind(rank).items():
            totals[kind] = totals.get(kind, 0.0) + seconds / layout.pipeline
    step = step_time(work, calibration, roof).seconds
    stretch = (step - roof.optimizer) / sum(totals.values())
    return {**{kind: seconds * stretch for kind, seconds in totals.items()}, "optimizer": roof.optimizer}


def stage_imbalance(layout: Layout, layers: float, ends_in_layers: float) -> float:
    """Fullest model chunk over the mean when whole layers, head and loss are spread over the pipeline's chunks."""
    if layout.pipeline == 1:
        return 1.0
    chunks = layout.chunks
    units = layers + ends_in_layers
    mean = units / chunks
    # The chunk with the head may hold no layer; the others share the layers as evenly as whole layers allow.
    others = math.ceil((layers - max(0.0, mean - ends_in_layers)) / max(1, chunks - 1) - 1e-9)
    return max(1.0, min(others, math.ceil(layers / chunks)) / mean, min(ends_in_layers, mean + 1) / mean)


def jitter_factor(devices: int, calibration: Calibration) -> float:
    """Stragglers and network noise: the same share slower with every doubling of devices beyond one node."""
    return 1 + calibration["jitter"] * max(0.0, math.log2(devices / DEVICES_PER_NODE))


def step_time(work: Workload, calibration: Calibration, roof: Rooflines | None = None) -> StepTime:
    """The chain for one step. `roof` may be passed when many calibrations are tried on one workload."""
    roof = roof or rooflines(work)
    count = work.micro_batches
    k = kernel_seconds(roof, work, calibration)
    forward, backward = busy(k)
    compute = count * (forward + backward) + roof.optimizer
    exposed = exposed_seconds(roof, work, calibration, compute)
    waiting = sum(exposed[kind] for kind in ("tensor", "expert", "context")) / count / 3
    bubble = bubble_seconds(work.layout, count, forward + waiting, backward + 2 * waiting, k.weight_gradient)
    routing = calibration["routing_imbalance"] if work.arch.is_moe and not work.balanced_routing else 1.0
    uneven = count * (routing - 1) * sum(k.grouped) + (roof.stage_imbalance - 1) * (count * (forward + backward))
    smooth = compute + sum(exposed.values()) + bubble
    jitter = (smooth + uneven) * (jitter_factor(work.layout.devices, calibration) - 1)

    links, total = [], 0.0
    for name, added in (
        ("ideal", roof.ideal),
        ("kernels", compute - roof.ideal),
        ("exposed communication", sum(exposed.values())),
        ("bubble", bubble),
        ("imbalance and jitter", uneven + jitter),
    ):
        before, total = total, total + added
        links.append(Link(name, total, added, total / before if before else 1.0))
    phases = {
        "matmul": count * sum(k.matmul),
        "grouped_matmul": count * sum(k.grouped),
        "attention": count * sum(k.attention),
        "elementwise": count * sum(k.elementwise),
        "optimizer": roof.optimizer,
        **{f"exposed_{kind}": seconds for kind, seconds in exposed.items()},
        "bubble": bubble,
        "imbalance": uneven,
        "jitter": jitter,
    }
    return StepTime(tuple(links), phases)


def seconds_without_bubble(work: Workload, calibration: Calibration, roof: Rooflines) -> float:
    """Kernels and exposed communication: a lower bound of the step that needs no executed schedule."""
    compute = work.micro_batches * sum(busy(kernel_seconds(roof, work, calibration))) + roof.optimizer
    return compute + sum(exposed_seconds(roof, work, calibration, compute).values())


def predict(
    work: Workload, calibration: Calibration, tokens: float | None = None, roof: Rooflines | None = None
) -> dict[str, Any]:
    """Step, rate and MFU of a workload and, with `tokens`, the hours of a whole run with its goodput; plain values.

    MFU counts 6 x active matmul weights and causal attention (with MTP if it trains), against the dense BF16 peak
    (FP32 for FP32), without recomputation.
    """
    if tokens is not None and not tokens > 0:
        raise UserError(f"a run of {tokens} tokens cannot be planned: give a positive number")
    step = step_time(work, calibration, roof)
    devices, rate = work.layout.devices, work.tokens / step.seconds
    core = "fp32" if work.precision == "fp32" else "bf16"
    flops = training_flops(work.arch, work.seq_len, mtp=work.mtp)
    out: dict[str, Any] = {
        "layout": str(work.layout),
        "step_seconds": step.seconds,
        "chain": [link._asdict() for link in step.chain],
        "phases": step.phases,
        "tokens_per_second_per_gpu": rate / devices,
        "mfu": {
            "value": model_flops_utilization(flops, rate, devices, work.hardware.peak_flops(core)),
            "convention": f"causal attention, {'with' if work.mtp else 'without'} MTP, no recomputation, "
            f"of {work.hardware.peak_flops(core) / 1e12:.0f} TFLOPS dense {core.upper()}",
        },
    }
    if tokens is not None:
        hours = tokens / rate / 3600 * devices
        goodput = calibration["goodput"]
        last = step.seconds / goodput
        out["chain"].append(Link("goodput", last, last - step.seconds, 1 / goodput)._asdict())
        out["gpu_hours"] = hours / goodput
        out["gpu_hours_at_full_goodput"] = hours
        out["days"] = hours / goodput / devices / 24
    return out


def busy(k: Kernels) -> Seconds:
    """Forward and backward seconds of all kernels."""
    return k.matmul + k.grouped + k.attention + k.elementwise


# Share of the forward that is computed again in the backward: matmul, grouped, attention, elementwise.
_RECOMPUTED = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "selective": (0.0, 0.0, 1.0, 0.0),
    "operators": (0.4, 0.5, 0.0, 1.0),
    "full": (1.0, 1.0, 1.0, 1.0),
    "deepseek": (0.0, 0.0, 0.0, 0.8),  # norms and SwiGLU; MLA's up-projections besides
}
MLA_UP_PROJECTIONS = 0.25  # of the dense products of a V3 layer


def _with_recomputation(k: Kernels, work: Workload) -> Kernels:
    matmul, grouped, attention, elementwise = _RECOMPUTED[work.layout.recompute]
    if work.layout.recompute == "selective" and work.attention != "unfused":
        attention = 0.0  # the fused kernel's backward does it already
    if work.layout.recompute == "deepseek" and work.arch.is_latent:
        matmul = MLA_UP_PROJECTIONS
    again = [
        Seconds(0.0, share * part.forward)
        for share, part in zip(
            (matmul, grouped, attention, elementwise), (k.matmul, k.grouped, k.attention, k.elementwise), strict=True
        )
    ]
    return k + Kernels(*again, weight_gradient=0.0)


def _traffic(work: Workload, held: Any) -> Traffic:
    arch, layout, hardware = work.arch, work.layout, work.hardware
    network = (hardware.network_gb_s or math.inf) * 1e9 * LINK_SHARE
    fast = hardware.nvlink_gb_s / 2 * 1e9 * LINK_SHARE if hardware.nvlink_gb_s else network
    modules = arch.num_nextn_predict_layers if work.mtp else 0
    tokens = work.micro_batches * layout.micro_batch * work.seq_len / layout.context  # through one rank in a step
    layers = (arch.num_hidden_layers + modules) / layout.pipeline
    moe_layers = (arch.moe_layers + (arch.mtp_moe_modules if work.mtp else 0)) / layout.pipeline
    passes = 3 if layout.recompute == "full" else 2  # forward, backward, and forward again
    tensor_link = fast if layout.tensor <= hardware.domain else network
    a2a = traffic.expert_all_to_all(arch, layout, hardware.domain, work.precision, work.node_limit)
    expert = max(a2a.network / network, a2a.fast_link / fast)
    neighbours = max(1, hardware.domain // layout.tensor)  # ranks of a data-parallel group in one domain
    data_link = min(fast, neighbours * network) if layout.data * layout.tensor > hardware.domain else fast
    sent = traffic.data_bytes(held, layout, work.precision, math.ceil(work.micro_batches))
    return Traffic(
        tensor=passes * layers * tokens * traffic.tensor_bytes(arch, layout) / tensor_link,
        expert=passes * moe_layers * tokens / layout.tensor * expert,
        data=sent / data_link,
        pipeline=2 * tokens * traffic.pipeline_bytes(arch, layout) / network,
        context=passes * layers * tokens * traffic.context_bytes(arch, layout) / fast,
    )


def _exposed(seconds: float, share: float, compute: float) -> float:
    """At least `share` of the traffic, and whatever exceeds the compute that could hide the rest."""
    share = min(1.0, share)
    return max(share * seconds, seconds - compute)
