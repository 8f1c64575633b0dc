"""A roofline for each operator of a step on one rank: seconds = max(FLOPs / reachable rate, bytes / bandwidth).

The reachable rate of a matrix product is the device's achieved one, less what a product of this shape leaves idle.
Nothing here is fitted; `baleen.cost.calibration` holds the few factors by which real steps are slower.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from baleen.cost.architecture import Architecture
from baleen.cost.flops import Matmul, attention_flops, head_matmul, layer_matmuls, mtp_projection
from baleen.cost.hardware import Hardware
from baleen.cost.layout import Layout
from baleen.cost.memory import STATE_BYTES, StageParameters

HALF_SIZE_AT_FLOPS = 312e12  # where Hardware.half_size holds; what is idle is idle for a fixed time
# Kernels of attention's core: before FlashAttention; FlashAttention-2, which was written for A100 and is what PyTorch's
# SDPA runs; and those written for each generation (FA-3, cuDNN 9).
Attention = Literal["unfused", "flash2", "native"]
# Share of the dense BF16 peak that fused attention reaches, forward and backward, at head size 128 under a causal
# mask: FA-2's paper (arXiv 2307.08691) on A100 and H100, FA-3's (2407.08608) on H100, cuDNN's release notes on B200.
ATTENTION_SHARE = {
    ("flash2", "ampere"): (0.60, 0.55),
    ("flash2", "hopper"): (0.36, 0.32),
    ("flash2", "blackwell"): (0.20, 0.17),
    ("native", "ampere"): (0.60, 0.55),
    ("native", "hopper"): (0.60, 0.50),
    ("native", "blackwell"): (0.55, 0.45),
}
USUAL_ATTENTION_SHARE = (0.50, 0.40)
ATTENTION_BACKWARD_FLOPS = 2.5  # of the forward: five products against two, the scores are computed again
# Unfused attention, before FlashAttention: bytes a score moves through memory, forward (mask, softmax, dropout)
# and backward; counted from Megatron's kernels as arXiv 2205.05198 lists them.
UNFUSED_SCORE_BYTES = (14, 20)


class Seconds(NamedTuple):
    """Forward and backward time of a class of kernels for one micro-batch on one rank."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: object) -> Seconds:
        assert isinstance(other, Seconds)
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> Seconds:
        return Seconds(self.forward * factor, self.backward * factor)


class Kernels(NamedTuple):
    """Seconds of one micro-batch by class: products, grouped products of experts, attention's core, the rest."""

    matmul: Seconds
    grouped: Seconds
    attention: Seconds
    elementwise: Seconds
    weight_gradient: float  # the part of matmul's backward that is for the weights
    grouped_weight_gradient: float  # the same of grouped

    def __add__(self, other: object) -> Kernels:
        assert isinstance(other, Kernels)
        return Kernels(
            self.matmul + other.matmul,
            self.grouped + other.grouped,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.weight_gradient + other.weight_gradient,
            self.grouped_weight_gradient + other.grouped_weight_gradient,
        )

    @property
    def busy(self) -> Seconds:
        """Forward and backward of all classes together."""
        return self.matmul + self.grouped + self.attention + self.elementwise

    def times(self, factor: float) -> Kernels:
        return Kernels(
            self.matmul.times(factor),
            self.grouped.times(factor),
            self.attention.times(factor),
            self.elementwise.times(factor),
            self.weight_gradient * factor,
            self.grouped_weight_gradient * factor,
        )


NOTHING = Kernels(Seconds(), Seconds(), Seconds(), Seconds(), 0.0, 0.0)


def matmul_seconds(
    hardware: Hardware,
    precision: str,
    m: float,
    n: float,
    k: float,
    operand_bytes: float = 2,
    half_sizes: float = 1.0,
) -> float:
    """One product [m, k] x [k, n] by the roofline; `half_sizes` times the device's half size in each dimension."""
    measured_call = getattr(hardware, f"product_call_us_{precision}", None)
    if measured_call is not None:
        rate = getattr(hardware, f"product_tb_s_{precision}") or math.inf
        moved = operand_bytes * (m * k + k * n + m * n)
        achieved = hardware.peak_flops(precision) * hardware.achieved_share(precision)
        return 2 * m * n * k / achieved + moved / (rate * 1e12) + measured_call / 1e6
    peak = hardware.peak_flops(precision)
    half = half_sizes * hardware.half_size * (peak / HALF_SIZE_AT_FLOPS) ** 0.5
    fill = m / (m + half) * n / (n + half) * k / (k + half)
    compute = 2 * m * n * k / (peak * hardware.achieved_share(precision) * fill)
    return max(compute, operand_bytes * (m * k + k * n + m * n) / _bandwidth(hardware))


def product(hardware: Hardware, precision: str, matmul: Matmul, tokens: float, experts: int = 1) -> Kernels:
    """A linear layer for `tokens` rows, forward, input and weight gradients; `experts` share the rows evenly."""
    rows, grouped = max(1.0, tokens / experts), matmul.part == "routed_experts"
    width = STATE_BYTES[precision].kept_linear_input
    half = hardware.grouped_half_size if grouped else 1.0

    def seconds(m: float, n: float, k: float) -> float:
        return experts * matmul_seconds(hardware, precision, m, n, k, width, half)

    weight_gradient = seconds(matmul.outer, matmul.inner, rows)
    backward = seconds(rows, matmul.inner, matmul.outer) + weight_gradient
    time = Seconds(seconds(rows, matmul.outer, matmul.inner), backward)
    return Kernels(
        matmul=Seconds() if grouped else time,
        grouped=time if grouped else Seconds(),
        attention=Seconds(),
        elementwise=Seconds(),
        weight_gradient=0.0 if grouped else weight_gradient,
        grouped_weight_gradient=weight_gradient if grouped else 0.0,
    )


def layer_kernels(
    arch: Architecture,
    layout: Layout,
    hardware: Hardware,
    precision: str,
    *,
    seq_len: int,
    moe: bool,
    attention: Attention = "native",
) -> Kernels:
    """One layer and one micro-batch on one rank, without recomputation."""
    tokens = layout.micro_batch * seq_len / layout.context
    total = NOTHING
    for matmul in layer_matmuls(arch, moe):
        if matmul.part == "routed_experts":
            local = max(1, arch.n_routed_experts // layout.expert)
            total += product(hardware, precision, matmul, tokens / layout.tensor * arch.num_experts_per_tok, local)
        elif matmul.part == "router":
            total += product(hardware, _router_precision(hardware), matmul, tokens / layout.tensor)
        else:
            total += product(hardware, precision, _split(matmul, layout.tensor), tokens)
    core = attention_seconds(arch, hardware, tokens, seq_len, precision, attention)
    elementwise = elementwise_bytes(arch, layout, precision, moe) * tokens / _bandwidth(hardware)
    copies = tokens * arch.num_experts_per_tok if moe else 0
    elementwise += hardware.layer_overhead_us / 3e6 + copies * hardware.copy_overhead_ns / 3e9
    return total._replace(attention=core.times(1 / layout.tensor), elementwise=Seconds(elementwise, 2 * elementwise))


def attention_seconds(
    arch: Architecture,
    hardware: Hardware,
    tokens: float,
    seq_len: int,
    precision: str,
    attention: Attention = "native",
) -> Seconds:
    """The core of one attention layer, all heads: scores, softmax, values; always in BF16 on a GPU."""
    flops = tokens * attention_flops(arch, seq_len)
    if hardware.attention_forward_tflops and hardware.attention_backward_tflops:
        forward, backward = hardware.attention_forward_tflops * 1e12, hardware.attention_backward_tflops * 1e12
        padded = 2 * arch.qk_head_dim / (arch.qk_head_dim + arch.v_head_dim)  # CPUs want values as wide as keys
        return Seconds(padded * flops / forward, ATTENTION_BACKWARD_FLOPS * padded * flops / backward)
    core = "fp32" if precision == "fp32" else "bf16"
    peak = hardware.peak_flops(core)
    if attention == "unfused":  # no skipping of masked scores; everything but products goes through memory
        scores = tokens * seq_len * arch.num_attention_heads / _bandwidth(hardware)
        dense = 2 * flops / (peak * hardware.achieved_share(core))
        reads, writes = UNFUSED_SCORE_BYTES
        return Seconds(dense + reads * scores, 2 * dense + writes * scores)
    forward, backward = ATTENTION_SHARE.get((attention, hardware.generation), USUAL_ATTENTION_SHARE)
    forward, backward = hardware.attention_forward_share or forward, hardware.attention_backward_share or backward
    width = (
        min(1.0, (arch.qk_head_dim + arch.v_head_dim) / 256) ** 0.5
    )  # narrow heads leave the exponentials to wait for
    return Seconds(flops / (peak * forward * width), ATTENTION_BACKWARD_FLOPS * flops / (peak * backward * width))


def elementwise_bytes(arch: Architecture, layout: Layout, precision: str, moe: bool) -> float:
    """Bytes per token and layer that norms, residuals, rope, activation, casts and token shuffling move, forward."""
    width, d = STATE_BYTES[precision].kept, arch.hidden_size
    stream = layout.tensor if layout.sequence_parallel else 1
    heads = arch.num_attention_heads * (arch.qk_head_dim + arch.v_head_dim) / layout.tensor
    moved = (
        2 * 4 * d / stream + 2 * arch.num_attention_heads * arch.qk_head_dim / layout.tensor
    )  # norms, residuals; rope
    if arch.kv_lora_rank is not None:
        moved += 2 * heads  # latents' norms are small; k and v are assembled from parts
    if moe:
        copies, ff = arch.num_experts_per_tok, arch.moe_intermediate_size
        sent = STATE_BYTES[precision].kept_linear_input / width  # dispatched in the linears' format, combined in full
        moved += (copies + arch.n_shared_experts) * ff * arch.ffn_matrices
        moved += 2 * copies * d * (sent + 1) / layout.tensor  # to the experts' order and back
        casts = (copies + arch.n_shared_experts) * ff + d
    else:
        ff = arch.intermediate_size / layout.tensor
        moved += ff * arch.ffn_matrices
        casts = ff + d
    total = moved * width
    if precision == "fp8":  # each linear input is read, and written in FP8 as it is and transposed; before dispatch
        total += (casts + d + arch.num_attention_heads * arch.v_head_dim / layout.tensor) * (2 + 1 + 1)
    return total


def ends_kernels(
    arch: Architecture, layout: Layout, hardware: Hardware, precision: str, seq_len: int, mtp: bool
) -> Kernels:
    """Output head and loss of one micro-batch (once more for each MTP module, with its projection), all on one rank."""
    tokens = layout.micro_batch * seq_len / layout.context
    core = "fp32" if precision == "fp32" else "bf16"
    logits = 3 * STATE_BYTES[precision].logit / 2 * tokens * arch.vocab_size / layout.tensor / _bandwidth(hardware)
    head = product(hardware, core, _split(head_matmul(arch), layout.tensor), tokens)
    head = head._replace(elementwise=Seconds(logits / 3, 2 * logits / 3))
    modules = arch.num_nextn_predict_layers if mtp else 0
    if not modules:
        return head
    projection = product(hardware, precision, _split(mtp_projection(arch), layout.tensor), tokens)
    return head.times(1 + modules) + projection.times(modules)


def optimizer_seconds(
    hardware: Hardware, held: StageParameters, layout: Layout, precision: str, expert_ranks: int
) -> float:
    """One optimizer step: state, gradient and weight of this rank's share read and written once.

    PyTorch on a measured machine also clips: the gradient is read for its norm, then read and written to scale it.
    """
    state = STATE_BYTES[precision]
    shared = held.shared / (layout.shard_ranks if layout.zero else 1)
    experts = held.experts / (expert_ranks if layout.zero else 1)
    moved = (2 * state.optimizer + 2 * state.gradient + state.weight) * (shared + experts)
    if hardware.update_tb_s:
        return (moved + 3 * state.gradient * (shared + experts)) / (hardware.update_tb_s * 1e12)
    return moved / _bandwidth(hardware)


def _split(matmul: Matmul, tensor: int) -> Matmul:
    """A tensor-parallel share: by rows for the products that close a block, else by columns."""
    if tensor == 1:
        return matmul
    if matmul.name in ("o_proj", "down", "shared_experts.down"):
        return matmul._replace(inner=max(1, matmul.inner // tensor))
    return matmul._replace(outer=max(1, matmul.outer // tensor))


def _router_precision(hardware: Hardware) -> str:
    return "fp32" if hardware.is_cpu else "bf16"


def _bandwidth(hardware: Hardware) -> float:
    if hardware.streaming_tb_s:
        return hardware.streaming_tb_s * 1e12
    return hardware.memory_tb_s * 1e12 * hardware.streaming_share
