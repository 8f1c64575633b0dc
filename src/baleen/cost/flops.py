"""Parameters, floating-point operations and cache of a network, per module and per token.

Conventions (DeepSeek's and PaLM's): a multiply-add is 2 FLOPs; training is 3 x forward; recomputation is not counted;
causal attention sees half of the sequence on average. The input embedding is a lookup and counts nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from baleen.cost.architecture import Architecture

TRAINING_OVER_FORWARD = 3  # forward, and a backward of two products of the same size (dgrad, wgrad)


class Matmul(NamedTuple):
    """A weight matrix [outer, inner] that a layer holds `held` times and of which one token uses `active`."""

    name: str
    part: str  # attention, dense_ffn, routed_experts, shared_experts, router, mtp_projection, head
    inner: int
    outer: int
    held: int = 1
    active: int = 1

    @property
    def parameters(self) -> int:
        return self.inner * self.outer * self.held

    @property
    def active_parameters(self) -> int:
        return self.inner * self.outer * self.active


def attention_matmuls(arch: Architecture) -> list[Matmul]:
    """Projections of one attention layer: MLA by its latents (2412.19437, Eq. 1-11), else GQA with q, k, v, o."""
    d, heads = arch.hidden_size, arch.num_attention_heads
    out = Matmul("o_proj", "attention", heads * arch.v_head_dim, d)
    if arch.kv_lora_rank is None:
        kv = arch.num_key_value_heads
        return [
            Matmul("q_proj", "attention", d, heads * arch.qk_head_dim),
            Matmul("k_proj", "attention", d, kv * arch.qk_head_dim),
            Matmul("v_proj", "attention", d, kv * arch.v_head_dim),
            out,
        ]
    if arch.q_lora_rank is None:
        query = [Matmul("q_proj", "attention", d, heads * arch.qk_head_dim)]
    else:
        query = [
            Matmul("q_a_proj", "attention", d, arch.q_lora_rank),
            Matmul("q_b_proj", "attention", arch.q_lora_rank, heads * arch.qk_head_dim),
        ]
    return [
        *query,
        Matmul("kv_a_proj_with_mqa", "attention", d, arch.kv_lora_rank + arch.qk_rope_head_dim),
        Matmul("kv_b_proj", "attention", arch.kv_lora_rank, heads * (arch.qk_nope_head_dim + arch.v_head_dim)),
        out,
    ]


def ffn_matmuls(arch: Architecture, moe: bool) -> list[Matmul]:
    """The feed-forward part of one layer; experts are held `n_routed_experts` and used `num_experts_per_tok` times."""
    d, ups = arch.hidden_size, arch.ffn_matrices - 1
    if not moe:
        ff = arch.intermediate_size
        return [Matmul("up", "dense_ffn", d, ups * ff), Matmul("down", "dense_ffn", ff, d)]
    ff, held, active = arch.moe_intermediate_size, arch.n_routed_experts, arch.num_experts_per_tok
    matmuls = [
        Matmul("gate", "router", d, held),
        Matmul("experts.up", "routed_experts", d, ups * ff, held, active),
        Matmul("experts.down", "routed_experts", ff, d, held, active),
    ]
    if arch.n_shared_experts:
        shared = arch.n_shared_experts * ff
        matmuls += [
            Matmul("shared_experts.up", "shared_experts", d, ups * shared),
            Matmul("shared_experts.down", "shared_experts", shared, d),
        ]
    return matmuls


def layer_matmuls(arch: Architecture, moe: bool) -> list[Matmul]:
    return attention_matmuls(arch) + ffn_matmuls(arch, moe)


def head_matmul(arch: Architecture) -> Matmul:
    return Matmul("lm_head", "head", arch.hidden_size, arch.vocab_size)


def mtp_projection(arch: Architecture) -> Matmul:
    return Matmul("eh_proj", "mtp_projection", 2 * arch.hidden_size, arch.hidden_size)


def layer_norms(arch: Architecture) -> int:
    """RMSNorm weights of one layer: before each sub-layer, and after each compressed latent."""
    return 2 * arch.hidden_size + (arch.q_lora_rank or 0) + (arch.kv_lora_rank or 0)


def parameters(arch: Architecture) -> dict[str, int]:
    """Parameters by part, without MTP (see `mtp_parameters`); `total` is their sum.

    The router's selection biases are no weights (they take no gradient): `selection_bias`, not in the total.
    """
    d, tied = arch.hidden_size, arch.tie_word_embeddings
    count = {"embedding": arch.vocab_size * d, "head": 0 if tied else arch.vocab_size * d}
    count["norms"] = arch.num_hidden_layers * layer_norms(arch) + d
    for moe, layers in ((False, arch.dense_layers), (True, arch.moe_layers)):
        for matmul in layer_matmuls(arch, moe):
            count[matmul.part] = count.get(matmul.part, 0) + layers * matmul.parameters
    count["total"] = sum(count.values())
    count["selection_bias"] = arch.moe_layers * arch.n_routed_experts
    return count


def mtp_parameters(arch: Architecture) -> int:
    """What the MTP modules add: projection, block and five norms' weights; embedding and head are shared."""
    modules, moe = arch.num_nextn_predict_layers, arch.mtp_moe_modules
    norms = layer_norms(arch) + 3 * arch.hidden_size  # enorm, hnorm, shared_head.norm
    blocks = moe * _held(arch, True) + (modules - moe) * _held(arch, False)
    return blocks + modules * (norms + mtp_projection(arch).parameters)


def active_parameters(arch: Architecture, input_embedding: bool = True) -> int:
    """Parameters one token passes through: all but the experts it is not sent to (V3: 37.55e9, 36.63e9 without)."""
    d = arch.hidden_size
    norms = arch.num_hidden_layers * layer_norms(arch) + d
    return norms + matmul_parameters(arch) + (arch.vocab_size * d if input_embedding else 0)


def matmul_parameters(arch: Architecture) -> int:
    """Active weights that multiply (the head counts, the input embedding and norms do not)."""
    layers = arch.dense_layers * _active(arch, False) + arch.moe_layers * _active(arch, True)
    return layers + head_matmul(arch).parameters


def mean_context(seq_len: int, causal: bool = True, window: int | None = None) -> float:
    """Keys a query sees on average over a sequence; `window` counts the query itself.

    Causal is seq/2, the continuous mean that published counters use (the exact one is (seq + 1) / 2).
    """
    if window is None or window >= seq_len:
        return seq_len / 2 if causal else seq_len
    return window * (1 - window / (2 * seq_len)) if causal else window


def attention_flops(arch: Architecture, seq_len: int, causal: bool = True) -> float:
    """Forward FLOPs per token of scores and values, averaged over the layers (full and sliding)."""
    full = mean_context(seq_len, causal)
    sliding = mean_context(seq_len, causal, arch.sliding_window)
    context = (1 - arch.sliding_share) * full + arch.sliding_share * sliding
    return 2 * context * arch.num_attention_heads * (arch.qk_head_dim + arch.v_head_dim)


def forward_flops(arch: Architecture, seq_len: int, *, causal: bool = True, mtp: bool = False) -> dict[str, float]:
    """Forward FLOPs per token by part; `mtp` adds the MTP modules (block, projection and a second use of the head)."""
    count: dict[str, float] = {"scores": arch.num_hidden_layers * attention_flops(arch, seq_len, causal)}
    for moe, layers in ((False, arch.dense_layers), (True, arch.moe_layers)):
        for matmul in layer_matmuls(arch, moe):
            count[matmul.part] = count.get(matmul.part, 0) + 2 * layers * matmul.active_parameters
    count["head"] = 2 * head_matmul(arch).parameters
    if mtp:
        count["mtp"] = mtp_forward_flops(arch, seq_len, causal)
    return count


def mtp_forward_flops(arch: Architecture, seq_len: int, causal: bool = True) -> float:
    modules, moe = arch.num_nextn_predict_layers, arch.mtp_moe_modules
    blocks = moe * _active(arch, True) + (modules - moe) * _active(arch, False)
    each = mtp_projection(arch).parameters + head_matmul(arch).parameters
    return 2 * (blocks + modules * each) + modules * attention_flops(arch, seq_len, causal)


def training_flops(arch: Architecture, seq_len: int, *, causal: bool = True, mtp: bool = False) -> float:
    """FLOPs per trained token, 3 x forward (V3 at 4096, causal: 250.4e9; with MTP 260.6e9)."""
    return TRAINING_OVER_FORWARD * sum(forward_flops(arch, seq_len, causal=causal, mtp=mtp).values())


def cache_bytes_per_token(arch: Architecture, bytes_per_number: float = 2, expanded: bool = False) -> float:
    """Key/value cache per token over all layers: the latent and its rope key under MLA, K and V otherwise.

    `expanded` counts MLA caches that store every head's K and V. A sliding layer still writes each token once.
    """
    if arch.kv_lora_rank is not None and not expanded:
        numbers = arch.kv_lora_rank + arch.qk_rope_head_dim
    else:
        numbers = arch.num_key_value_heads * (arch.qk_head_dim + arch.v_head_dim)
    return arch.num_hidden_layers * numbers * bytes_per_number


def model_flops_utilization(
    flops_per_token: float, tokens_per_second: float, devices: float, peak_flops: float
) -> float:
    """MFU: counted FLOPs over peak. Its convention (causal or not, MTP or not, which peak) belongs beside it."""
    return flops_per_token * tokens_per_second / (devices * peak_flops)


def _held(arch: Architecture, moe: bool) -> int:
    return sum(matmul.parameters for matmul in layer_matmuls(arch, moe))


def _active(arch: Architecture, moe: bool) -> int:
    return sum(matmul.active_parameters for matmul in layer_matmuls(arch, moe))
