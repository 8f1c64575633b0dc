"""Time of a training step as a chain: ideal -> kernels -> exposed communication -> bubble -> imbalance and jitter.

Each link is a function of rooflines (`baleen.cost.kernels`), byte counts (`baleen.cost.traffic`), the executed
schedule (`baleen.cost.simulator`) and the few factors of `baleen.cost.calibration`; goodput closes the chain of a run.
Times are seconds of one step on the average rank unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from baleen.cost import kernels
from baleen.cost.bubble import bubble_seconds, busy_seconds, least_wait, stage_imbalance, whole
from baleen.cost.calibration import Calibration
from baleen.cost.communication import Traffic, exposed_seconds, link_seconds, passes
from baleen.cost.flops import forward_flops, model_flops_utilization, training_flops
from baleen.cost.kernels import Kernels
from baleen.cost.memory import stage_parameters
from baleen.cost.recomputation import with_recomputation
from baleen.cost.simulator import Durations
from baleen.cost.workload import Workload

DEVICES_PER_NODE = 8


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
            total += with_recomputation(layer, work).times(layers)
    ends = kernels.ends_kernels(arch, layout, hardware, work.precision, work.seq_len, work.mtp)
    layer_time = sum(total.busy) / (arch.num_hidden_layers + modules)
    imbalance = stage_imbalance(layout, arch.num_hidden_layers + modules, sum(ends.busy) / layer_time)
    held = stage_parameters(
        arch, layout, arch.num_hidden_layers / stages, ends=min(2, 2 / stages), mtp=modules / stages
    )
    return Rooflines(
        ideal=ideal_seconds(work),
        kernels=(total + ends).times(1 / stages),
        optimizer=kernels.optimizer_seconds(hardware, held, layout, work.storage, layout.expert_replicas),
        traffic=link_seconds(work, held),
        stage_imbalance=imbalance,
    )


def ideal_seconds(work: Workload) -> float:
    """Every counted FLOP at the dense peak of its format: linear layers in theirs, scores, router and head in BF16."""
    arch = work.arch
    parts = forward_flops(arch, work.seq_len, mtp=work.mtp)
    core = "fp32" if work.precision == "fp32" else "bf16"
    in_core = parts["scores"] + parts["head"] + parts.get("router", 0.0)
    if work.mtp:  # each module has scores, a head and, with experts, a router of its own
        in_core += arch.num_nextn_predict_layers * (parts["scores"] / arch.num_hidden_layers + parts["head"])
        in_core += arch.mtp_moe_modules * parts.get("router", 0.0) / max(1, arch.moe_layers)
    in_linear = sum(parts.values()) - in_core
    rate = in_linear / work.hardware.peak_flops(work.precision) + in_core / work.hardware.peak_flops(core)
    return 3 * rate * work.tokens / work.layout.devices


def kernel_seconds(roof: Rooflines, work: Workload, calibration: Calibration) -> Kernels:
    """Kernels of one micro-batch with products and streaming kernels as fast as they are inside real training."""
    if work.hardware.is_cpu:  # its rates were measured inside training
        return roof.kernels
    generation = f"matmul_{work.hardware.generation}"
    slower = calibration.get(generation, 1.0)
    if work.precision == "fp8":
        slower *= calibration["matmul_fp8"]
    elementwise = calibration["elementwise"] * (calibration["eager"] if work.eager else 1.0)
    k = roof.kernels
    grouped = slower * calibration["grouped"]
    return Kernels(
        matmul=k.matmul.times(slower),
        grouped=k.grouped.times(grouped),
        attention=k.attention.times(calibration["attention"]),
        elementwise=k.elementwise.times(elementwise),
        weight_gradient=k.weight_gradient * slower,
        grouped_weight_gradient=k.grouped_weight_gradient * grouped,
    )


def operation_seconds(roof: Rooflines, work: Workload, k: Kernels, exposed: dict[str, float]) -> Durations:
    """One micro-batch on one rank as the schedule runs it: operations wait for the communication that is not hidden.

    Where pairs overlap, an operation that runs alone waits for all of its all-to-all. In a pair that is hidden; but
    communication keeps some multiprocessors, which slows products and attention (streaming kernels need few).
    """
    count, forward = work.micro_batches, 1 / passes(work)
    alone = exposed["tensor"] + exposed["expert"] + exposed["context"]
    if work.layout.overlaps:
        alone += roof.traffic.expert
    alone /= count
    durations = Durations(
        k.busy.forward + forward * alone,
        k.busy.backward + (1 - forward) * alone,
        k.weight_gradient + k.grouped_weight_gradient,
    )
    if not work.layout.overlaps:
        return durations
    slowed = 1.0 if work.layout.expert == 1 else 1 / work.hardware.overlapped_compute_share
    streaming = sum(k.elementwise)
    pair = max(streaming + slowed * (sum(k.busy) - streaming), roof.traffic.expert / count)
    return replace(durations, overlap=min(1.0, pair / (sum(k.busy) + alone)))


def jitter_factor(devices: int, calibration: Calibration) -> float:
    """Stragglers and network noise: the same share slower with every doubling of devices beyond one node."""
    return 1 + calibration["jitter"] * max(0.0, math.log2(devices / DEVICES_PER_NODE))


def step_time(work: Workload, calibration: Calibration, roof: Rooflines | None = None) -> StepTime:
    """The chain for one step. `roof` may be passed when many calibrations are tried on one workload."""
    roof = roof or rooflines(work)
    count = work.micro_batches
    k = kernel_seconds(roof, work, calibration)
    plain = count * sum(k.busy)
    compute = plain + roof.optimizer
    exposed = exposed_seconds(roof.traffic, work, calibration, compute)
    durations = operation_seconds(roof, work, k, exposed)
    if work.layout.overlaps:
        exposed["expert"] = busy_seconds(work.layout, count, durations) - plain
    bubble = bubble_seconds(work.layout, count, durations)
    uneven_ranks = work.layout.expert > 1 and not work.balanced_routing
    routing = calibration["routing_imbalance"] if uneven_ranks else 1.0
    uneven = count * (routing - 1) * sum(k.grouped) + (roof.stage_imbalance - 1) * plain
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


def least_seconds(work: Workload, calibration: Calibration, roof: Rooflines) -> float:
    """A lower bound of the step that needs no executed schedule: work, communication and the least wait."""
    k = kernel_seconds(roof, work, calibration)
    exposed = exposed_seconds(roof.traffic, work, calibration, work.micro_batches * sum(k.busy) + roof.optimizer)
    durations = operation_seconds(roof, work, k, exposed)
    waited = sum(exposed[kind] for kind in ("tensor", "expert", "context"))
    busy = busy_seconds(work.layout, work.micro_batches, durations) + sum(exposed.values()) - waited
    return busy + roof.optimizer + least_wait(work.layout, *whole(durations)[:2])


def predict(work: Workload, calibration: Calibration, roof: Rooflines | None = None) -> dict[str, Any]:
    """Step, rate and MFU of a workload; plain values.

    MFU counts 6 x active matmul weights and causal attention (with MTP if it trains), against the dense BF16 peak
    (FP32 for FP32), without recomputation.
    """
    step = step_time(work, calibration, roof)
    devices, rate = work.layout.devices, work.tokens / step.seconds
    core = "fp32" if work.precision == "fp32" else "bf16"
    flops = training_flops(work.arch, work.seq_len, mtp=work.mtp)
    return {
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
