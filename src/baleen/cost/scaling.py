"""Scaling laws: how to split a compute budget between the size of the model and the number of tokens.

Size is measured in training FLOPs per token (M), not in parameters: that is what is paid for, and it is the one
measure under which dense models and mixtures of experts can be compared at all. The laws were fitted on dense models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from baleen.config import UserError
from baleen.cost.architecture import Architecture
from baleen.cost.flops import training_flops

WIDTHS = range(256, 65536 + 1, 256)  # of V3-shaped networks


class ScalingLaw(NamedTuple):
    """compute [FLOPs] -> best training FLOPs per token; the tokens are compute over that."""

    name: str
    flops_per_token: Callable[[float], float]
    source: str


def _deepseek(compute: float) -> float:
    return 0.1715 * compute**0.5243


def _chinchilla(compute: float) -> float:
    # L = E + A / N^alpha + B / D^beta at 6 N D = C has its minimum at N = G (C / 6)^(beta / (alpha + beta)).
    a, b, alpha, beta = 482.01, 2085.43, 0.3478, 0.3658
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    return 6 * g * (compute / 6) ** (beta / (alpha + beta))


LAWS = {
    "deepseek": ScalingLaw(
        "deepseek",
        _deepseek,
        "DeepSeek LLM (arXiv 2401.02954, Eq. 4): M = 0.1715 C^0.5243, D = 5.8316 C^0.4757, dense models, their data",
    ),
    "chinchilla": ScalingLaw(
        "chinchilla",
        _chinchilla,
        "Hoffmann et al. (arXiv 2203.15556) as refitted by Besiroglu et al. (arXiv 2404.10102): "
        "L = 1.8172 + 482.01 / N^0.3478 + 2085.43 / D^0.3658, dense models, MassiveText",
    ),
}


class Allocation(NamedTuple):
    """What a law makes of a budget."""

    flops_per_token: float
    tokens: float
    law: ScalingLaw


def allocate(compute: float, law: str = "deepseek") -> Allocation:
    """The best split of `compute` training FLOPs. Raises UserError for an unknown law."""
    if law not in LAWS:
        raise UserError(f"no scaling law {law!r}: take one of {', '.join(LAWS)}")
    size = LAWS[law].flops_per_token(compute)
    return Allocation(size, compute / size, LAWS[law])


def v3_shaped(hidden_size: int) -> Architecture:
    """DeepSeek-V3's proportions (256 experts, 8 and 1 active, MLA, one MTP module) at another hidden size.

    Widths scale with the hidden size, depth too up to V3's 61 layers; latent, head and expert sizes keep to tiles of
    64 or 128. At 7168 this is V3 itself.
    """
    scale = hidden_size / 7168

    def tiles(width: float, tile: int) -> int:
        return max(tile, round(width * scale / tile) * tile)

    heads = tiles(128, 8)  # tensor parallelism divides heads
    layers = max(4, min(61, round(61 * scale)))
    return Architecture(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        vocab_size=129280,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        q_lora_rank=tiles(1536, 128),
        kv_lora_rank=min(512, tiles(512, 64)),
        intermediate_size=tiles(18432, 128),
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        moe_intermediate_size=tiles(2048, 128),
        first_k_dense_replace=max(1, round(3 * layers / 61)),
        num_nextn_predict_layers=1,
    )


def v3_shaped_for(flops_per_token: float, seq_len: int) -> Architecture:
    """The V3-shaped network whose training FLOPs per token come nearest, 256 to 65,536 wide. Raises UserError."""
    if not _flops(WIDTHS[0], seq_len) / 2 <= flops_per_token <= _flops(WIDTHS[-1], seq_len) * 2:
        raise UserError(
            f"the scaling law asks for {flops_per_token:.3g} FLOPs per token; V3-shaped networks of 256 to 65,536 in "
            f"width reach {_flops(WIDTHS[0], seq_len):.3g} to {_flops(WIDTHS[-1], seq_len):.3g}: name a model"
        )
    low, high = 0, len(WIDTHS) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _flops(WIDTHS[middle], seq_len) < flops_per_token else (low, middle)
    best = min((WIDTHS[low], WIDTHS[high]), key=lambda width: abs(_flops(width, seq_len) - flops_per_token))
    return v3_shaped(best)


def _flops(hidden_size: int, seq_len: int) -> float:
    return training_flops(v3_shaped(hidden_size), seq_len)
