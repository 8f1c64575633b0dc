"""Memory of one rank in training: weights, gradients, optimizer state and the activations that wait for their backward.

Bytes throughout. Static parts are exact counts; activations list what autograd keeps for each module, with attention's
scores never stored (FlashAttention). Symbols as in arXiv 2205.05198: s tokens, h hidden; shares by TP.
"""

from __future__ import annotations

from typing import NamedTuple

from baleen.config import UserError
from baleen.cost.architecture import Architecture
from baleen.cost.flops import head_matmul, layer_matmuls, layer_norms, mtp_projection
from baleen.cost.layout import Layout

GIB = 1024**3
GATHERED_LAYERS = 2  # FSDP2 prefetches one layer ahead


class StateBytes(NamedTuple):
    """Bytes a parameter takes in each role, and bytes of a number kept for the backward pass."""

    weight: float
    gradient: float
    optimizer: float  # master copy and two moments
    kept: float  # an activation as the next operator's input
    kept_linear_input: float  # an activation as the input of a linear layer (FP8 training keeps those in FP8)
    logit: float  # logits and their gradient, in training precision and in FP32
    stream: float  # a number of the residual stream


# fp32: as Baleen trains on a CPU. bf16: FP32 master weights, moments and gradients (Megatron's default; 18 bytes).
# fp8: V3's recipe (2412.19437 §3.3.3): BF16 weights with an FP8 copy to multiply with, FP32 gradients and master
# weights, BF16 moments; linear inputs in FP8 with one FP32 scale per 128.
# autocast: BF16 products over FP32 weights, whose BF16 copies live until the backward; gradients are widened singly;
# the residual stream, the router and what rotates are FP32, all else BF16; logits come and go in chunks.
STATE_BYTES = {
    "autocast": StateBytes(6, 4, 8, 2, 2, 0, 4),
    "fp32": StateBytes(4, 4, 8, 4, 4, 8, 4),
    "bf16": StateBytes(2, 4, 12, 2, 2, 12, 2),
    "fp8": StateBytes(3, 4, 8, 2, 1 + 4 / 128, 12, 2),
}


class RankMemory(NamedTuple):
    """Bytes on one pipeline rank: embedding, head and layers spread evenly, activations as the first rank has them."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    process: float = 0.0  # of the libraries, where it was measured

    @property
    def total(self) -> float:
        return sum(self)


class StageParameters(NamedTuple):
    """Parameters one rank holds: those of experts (spread over EP) and all others (spread over TP)."""

    shared: float
    experts: float


def stage_parameters(
    arch: Architecture, layout: Layout, layers: float, *, ends: float = 0, mtp: float = 0
) -> StageParameters:
    """Parameters of one rank that holds `layers` average layers, `ends` of embedding or head, `mtp` modules."""
    moe_share = arch.moe_layers / arch.num_hidden_layers
    shared = experts = 0.0
    blocks = [(True, layers * moe_share), (False, layers * (1 - moe_share))]
    if arch.num_nextn_predict_layers:
        mtp_moe = arch.mtp_moe_modules / arch.num_nextn_predict_layers
        blocks += [(True, mtp * mtp_moe), (False, mtp * (1 - mtp_moe))]
    for moe, count in blocks:
        if not count:
            continue
        for matmul in layer_matmuls(arch, moe):
            if matmul.part == "routed_experts":
                experts += count * matmul.parameters / layout.expert
            else:
                shared += count * matmul.parameters / (1 if matmul.part == "router" else layout.tensor)
        shared += count * layer_norms(arch)
    shared += (ends * head_matmul(arch).parameters + mtp * mtp_projection(arch).parameters) / layout.tensor
    return StageParameters(shared, experts)


def layer_activation_bytes(arch: Architecture, layout: Layout, precision: str, moe: bool) -> float:
    """Bytes kept per token and layer on one rank between forward and backward."""
    state, policy = STATE_BYTES[precision], layout.recompute
    d, heads = arch.hidden_size, arch.num_attention_heads
    split = layout.tensor if layout.sequence_parallel else 1  # without SP, TP leaves the residual stream whole
    keys_values = arch.num_key_value_heads * (arch.qk_head_dim + arch.v_head_dim)
    if policy == "full":
        return d * state.stream / split
    if policy == "operators":  # the layer's input, attention's output, and every second matmul: q, v, gate, down
        ff = arch.moe_intermediate_size * arch.num_experts_per_tok if moe else arch.intermediate_size
        inner = heads * (arch.qk_head_dim + arch.v_head_dim) + keys_values / 2 + ff
        return (2 * d / split + inner / layout.tensor) * state.kept + 4 * heads / layout.tensor
    deepseek, again = policy == "deepseek", policy in ("deepseek", "modules")
    kept, linear = state.kept, 0 if again else state.kept_linear_input  # bytes of a norm's or SwiGLU's output
    swiglu = state.kept_linear_input if deepseek else state.kept  # V3 keeps SwiGLU's input in FP8

    wide = state.stream - kept  # what the residual stream has beyond the width of products
    total = 2 * d * (state.stream + linear) / split  # the residual stream before each norm, and what each norm hands on
    core = heads * (arch.qk_head_dim + arch.v_head_dim) + keys_values  # q and the output, k and v
    if arch.kv_lora_rank is not None:
        latents = (arch.q_lora_rank or 0) + arch.kv_lora_rank + arch.qk_rope_head_dim
        total += latents * (kept + linear) / split
        if policy == "modules":  # the norm of the latent is made again, its copy beside the rotated key is not
            total += (arch.kv_lora_rank + arch.qk_rope_head_dim) * kept / split
        # Rotation is as wide as the stream, the latents beside the rotated key with it, which are narrowed once more.
        rotated = 0 if policy == "modules" else heads * arch.qk_rope_head_dim / layout.tensor
        total += wide * (rotated + 2 * arch.kv_lora_rank + arch.qk_rope_head_dim)
        core = heads * arch.v_head_dim if again else core  # q, k and v come again from the latents
    total += (core * kept + 4 * heads) / layout.tensor  # 4: attention's log-sum-exp in FP32
    inner = (arch.ffn_matrices - 1) * swiglu + linear
    if not moe:
        return total + arch.intermediate_size * inner / layout.tensor
    routed = arch.num_experts_per_tok
    total += (routed + arch.n_shared_experts) * arch.moe_intermediate_size * inner
    total += routed * d * (state.kept_linear_input + (0 if deepseek else kept))  # copies sent, and outputs to weigh
    router = 4 * arch.n_routed_experts + (state.stream * d if wide else 0)  # its scores, and its input made wide
    return total + router / split


def in_flight_layers(layout: Layout, layers: float, micro_batches: int) -> float:
    """Micro-batches times layers whose activations the fullest rank (the first) keeps at once.

    1F1B and ZB1P keep PP micro-batches; interleaving adds (PP-1)/(PP V); DualPipe keeps PP + 1 (2412.19437 table 2),
    DualPipeV as many halves as it has stages, and one. The simulator executes the schedules and holds these counts.
    """
    ranks, chunks = layout.pipeline, layout.chunks
    if ranks == 1:
        return layers
    if layout.schedule in ("dualpipe", "dualpipev"):
        return min(chunks + 1, micro_batches * chunks // ranks) * layers / chunks
    if chunks > ranks:
        return min(ranks + (ranks - 1) * ranks / chunks, micro_batches) * layers / ranks
    return min(ranks, micro_batches) * layers / ranks


def rank_memory(
    arch: Architecture,
    layout: Layout,
    *,
    seq_len: int,
    micro_batches: int,
    precision: str = "bf16",
    mtp: bool = True,
    process_bytes: float = 0.0,
) -> RankMemory:
    """Memory of a rank. DualPipe holds a part of each direction, so every weight twice.

    In a pipeline static parts are the mean rank's: one that holds embedding or head has them whole and, being balanced
    by time, fewer layers; `baleen train --dry-run` counts rank by rank. Logits are taken as made in chunks there.

    Raises UserError for a pipeline with more stages than layers.
    """
    if precision not in STATE_BYTES:
        raise UserError(f"unknown precision {precision!r}: known are {', '.join(STATE_BYTES)}")
    stages = layout.pipeline
    if layout.chunks > arch.num_hidden_layers + 2:
        raise UserError(
            f"PP{stages} with {layout.chunks // stages} chunks a rank needs at least {layout.chunks} layers; the model "
            f"has {arch.num_hidden_layers}"
        )
    state = STATE_BYTES[precision]
    copies = layout.copies
    modules = arch.num_nextn_predict_layers if mtp else 0
    both_ends = 1 if arch.tie_word_embeddings and stages == 1 else 2
    # A pipeline is balanced by time, so the rank with the head holds fewer layers: the average rank is taken for the
    # layers and the ends are spread like them, except that at most one of them sits on a rank.
    held = stage_parameters(
        arch,
        layout,
        arch.num_hidden_layers / stages,
        ends=min(1, both_ends / stages) if stages > 1 else both_ends,
        mtp=modules / stages,
    )
    held = StageParameters(held.shared * copies, held.experts * copies)
    shared_ranks, expert_ranks = layout.shard_ranks, _expert_shard(layout)
    weights = state.weight * _sharded(held, layout.zero >= 3, shared_ranks, expert_ranks)
    if layout.zero >= 3 and shared_ranks > 1:  # one layer at work and the next one being gathered
        layer = stage_parameters(arch, layout, 1)
        weights += state.weight * GATHERED_LAYERS * (layer.shared + (layer.experts if expert_ranks > 1 else 0))
    gradients = state.gradient * _sharded(held, layout.zero >= 2, shared_ranks, expert_ranks)
    # The two copies of a DualPipe rank are one set of weights seen from both ends: one optimizer state serves both.
    once = StageParameters(held.shared / copies, held.experts / copies)
    optimizer = state.optimizer * _sharded(once, layout.zero >= 1, shared_ranks, expert_ranks)

    tokens = layout.micro_batch * seq_len / layout.context
    moe_share = arch.moe_layers / arch.num_hidden_layers
    per_layer = (1 - moe_share) * layer_activation_bytes(arch, layout, precision, False)
    per_layer += moe_share * layer_activation_bytes(arch, layout, precision, True)
    activations = tokens * per_layer * in_flight_layers(layout, arch.num_hidden_layers + modules, micro_batches)
    if layout.recompute == "full":  # one layer's activations are rebuilt at a time
        whole = layout.model_copy(update={"recompute": "none"})
        activations += tokens * layer_activation_bytes(arch, whole, precision, arch.is_moe)
    logits = state.logit * tokens * arch.vocab_size / layout.tensor if stages == 1 else 0.0
    return RankMemory(weights, gradients, optimizer, activations, logits, process_bytes)


def _expert_shard(layout: Layout) -> int:
    """Ranks that hold the same experts and so share their ZeRO state."""
    if layout.shard:
        return max(1, layout.shard_ranks * layout.tensor // layout.expert)
    return layout.expert_replicas


def _sharded(held: StageParameters, sharded: bool, shared_ranks: int, expert_ranks: int) -> float:
    if not sharded:
        return held.shared + held.experts
    return held.shared / shared_ranks + held.experts / expert_ranks
