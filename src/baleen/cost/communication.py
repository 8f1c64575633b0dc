"""Seconds a step's traffic takes on its links, and how much of that compute does not hide."""

from __future__ import annotations

import math
from typing import NamedTuple

from baleen.cost import traffic
from baleen.cost.calibration import Calibration
from baleen.cost.memory import StageParameters
from baleen.cost.workload import Workload

# Schedules that put weight gradients off leave those of the last micro-batches to the end of the step: nothing is left
# there for the exchange of gradients to hide behind.
WEIGHT_GRADIENTS_LAST = ("zb1p", "dualpipe", "dualpipev")


class Traffic(NamedTuple):
    """Seconds on the links per step and rank, as if nothing were hidden."""

    tensor: float
    expert: float
    data: float
    pipeline: float
    context: float


def passes(work: Workload) -> int:
    """How often activations cross between ranks: forward, backward, and forward again if all is recomputed."""
    return 3 if work.layout.recompute == "full" else 2


def link_seconds(work: Workload, held: StageParameters) -> Traffic:
    """Bytes over the rate of their links; `held` are the parameters of one rank, one copy of them."""
    arch, layout, hardware = work.arch, work.layout, work.hardware
    network = (hardware.network_gb_s or math.inf) * 1e9 * hardware.link_share
    fast = hardware.nvlink_gb_s / 2 * 1e9 * hardware.link_share if hardware.nvlink_gb_s else network
    modules = arch.num_nextn_predict_layers if work.mtp else 0
    tokens = work.micro_batches * layout.micro_batch * work.seq_len / layout.context  # through one rank in a step
    layers = (arch.num_hidden_layers + modules) / layout.pipeline
    moe_layers = (arch.moe_layers + (arch.mtp_moe_modules if work.mtp else 0)) / layout.pipeline
    tensor_link = fast if layout.tensor <= hardware.domain else network
    context_link = fast if layout.tensor * layout.context <= hardware.domain else network
    a2a = traffic.expert_all_to_all(arch, layout, hardware.domain, work.precision, work.node_limit)
    expert = max(a2a.network / network, a2a.fast_link / fast)
    sent = traffic.data_bytes(held, layout, work.precision, math.ceil(work.micro_batches))

    def replicas_link(ranks: int, apart: int) -> float:
        """Rate between replicas that lie `apart` ranks from each other: those in one domain share its ways out."""
        together = max(1, hardware.domain // apart)
        return fast if ranks <= together else min(fast, together * network)

    return Traffic(
        tensor=passes(work) * layers * tokens * traffic.tensor_bytes(arch, layout) / tensor_link,
        expert=passes(work) * moe_layers * tokens / layout.tensor * expert,
        data=sent.shared / replicas_link(layout.data * layout.context, layout.tensor)
        + sent.experts / replicas_link(layout.expert_replicas, layout.expert),
        pipeline=2 * tokens * traffic.pipeline_bytes(arch, layout) / network,
        context=passes(work) * layers * tokens * traffic.context_bytes(arch, layout) / context_link,
    )


def exposed_seconds(t: Traffic, work: Workload, calibration: Calibration, compute: float) -> dict[str, float]:
    """Communication per step that compute of `compute` seconds does not hide, by kind.

    Experts' traffic of a schedule that overlaps pairs is not in it: it lengthens the operations that run alone.
    """
    at_the_end = work.layout.schedule in WEIGHT_GRADIENTS_LAST and work.layout.pipeline > 1
    return {
        "tensor": t.tensor * min(1.0, calibration["tensor_exposed"]),
        "expert": 0.0 if work.layout.overlaps else _exposed(t.expert, calibration["expert_exposed"], compute),
        "data": t.data if at_the_end else _exposed(t.data, calibration["data_exposed"], compute),
        "pipeline": _exposed(t.pipeline, 0.0, compute),
        "context": _exposed(t.context, 0.0, compute),
    }


def _exposed(seconds: float, share: float, compute: float) -> float:
    """At least `share` of the traffic, and whatever exceeds the compute that could hide the rest."""
    share = min(1.0, share)
    return max(share * seconds, seconds - compute)
