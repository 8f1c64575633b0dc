"""What serving costs: dollars per million tokens, prefill and decode.

A roofline of one device gives a bound: weights and cache read once a step, products at the achieved rate, experts'
traffic hidden behind them (two batches take turns, V3 §3.4). A real service stays below its bound: load varies over
the day, batches are uneven. That share is taken from the one service that published its figures, DeepSeek's day 6, and
applied to every other model and device; so for V3 on H800 the estimate repeats day 6 and is no prediction.
"""

from __future__ import annotations

from functools import cache
from math import ceil
from typing import Any, NamedTuple

from baleen.cost.architecture import Architecture, from_model_config
from baleen.cost.factors import Factors, factor_table
from baleen.cost.flops import cache_bytes_per_token, forward_flops, matmul_parameters, parameters
from baleen.cost.hardware import Hardware, find_hardware
from baleen.cost.layout import Layout
from baleen.cost.traffic import COMBINE_BYTES, DISPATCH_BYTES, expert_all_to_all, tensor_bytes
from baleen.recipe import load_recipe

BYTES_PER_WEIGHT = {"fp8": 1.0, "bf16": 2.0, "fp32": 4.0}


class Bound(NamedTuple):
    """The most one device can do: tokens per second, what stands in the way, and sequences per device (decode)."""

    tokens_per_second: float
    limit: str
    batch: float


class Unit(NamedTuple):
    """Devices that hold one copy of the model: experts spread over all of them, or a dense model split by TP."""

    layout: Layout
    weight_bytes: float  # per device


def serving_unit(
    arch: Architecture, hardware: Hardware, precision: str, ranks: int, redundant: int, share: float
) -> Unit | None:
    """The unit for a model: one device if half its memory holds the weights, else `ranks` for experts, or TP.

    None if no unit within reach holds the model (experts need a network, tensor parallelism the fast link).
    """
    width = BYTES_PER_WEIGHT[precision]
    room = hardware.memory_gb * 1e9 * share / 2  # the other half for the cache
    total = parameters(arch)["total"] * width
    if total <= room:
        return Unit(Layout(devices=1), total)
    if arch.is_moe and hardware.network_gb_s:
        ranks = min(ranks, arch.n_routed_experts)
        experts = parameters(arch)["routed_experts"] * width
        local = ceil((arch.n_routed_experts + redundant) / ranks) / arch.n_routed_experts
        weights = total - experts + experts * local
        return Unit(Layout(devices=ranks, expert=ranks), weights) if weights <= 2 * room else None
    for tensor in (2, 4, 8, 16, 32, 64):
        if tensor <= hardware.domain and total / tensor <= room:
            return Unit(Layout(devices=tensor, tensor=tensor), total / tensor)
    return None


def prefill_bound(
    arch: Architecture, hardware: Hardware, precision: str, unit: Unit, prompt: float, node_limit: int | None = None
) -> Bound:
    """Prompt tokens per second and device, none of them cached. `node_limit`: most nodes a token's experts lie on."""
    flops = forward_flops(arch, round(prompt))
    scores = flops.pop("scores")
    compute = sum(flops.values()) / (hardware.peak_flops(precision) * hardware.achieved_share(precision))
    compute += scores / (hardware.peak_flops(_core(precision)) * hardware.cached_attention_share)
    sent = expert_all_to_all(arch, unit.layout, hardware.domain, precision, node_limit).network * arch.moe_layers
    network = sent / (hardware.network_gb_s * 1e9) if sent and hardware.network_gb_s else 0.0
    seconds = max(compute, network) + _tensor_seconds(arch, hardware, unit)
    return Bound(1 / seconds, "network" if network > compute else "compute", 0)


def decode_bound(
    arch: Architecture, hardware: Hardware, precision: str, unit: Unit, context: float, speed: float, share: float
) -> Bound | None:
    """Generated tokens per second and device, with every stream at `speed` tokens per second or faster.

    The batch is the largest that meets the speed and whose caches fit; None if a single sequence does not.
    """
    bandwidth = hardware.memory_tb_s * 1e12 * hardware.cached_bandwidth_share
    cache = context * cache_bytes_per_token(arch)
    work = 2 * matmul_parameters(arch) / (hardware.peak_flops(precision) * hardware.achieved_share(precision))
    if arch.kv_lora_rank is None:
        width = arch.qk_head_dim + arch.v_head_dim
    else:  # absorbed: every head reads the latent, as key and as value
        width = 2 * arch.kv_lora_rank + arch.qk_rope_head_dim
    scores = 2 * context * arch.num_attention_heads * width * arch.num_hidden_layers
    core = hardware.peak_flops(_core(precision)) * hardware.cached_attention_share
    attention = max(cache / bandwidth, scores / core)
    network = 0.0
    if unit.layout.expert > 1 and hardware.network_gb_s:
        # Decode sends each copy by itself to where its expert is (DeepEP's low-latency mode; ISCA §2.3.2).
        away = arch.num_experts_per_tok * max(0.0, 1 - hardware.domain / unit.layout.expert)
        sent = away * arch.hidden_size * (DISPATCH_BYTES[precision] + COMBINE_BYTES[precision])
        network = arch.moe_layers * sent / (hardware.network_gb_s * 1e9)

    def step(batch: float) -> tuple[float, str]:
        read, products = unit.weight_bytes / bandwidth, work * batch
        busy = max(read, products) + attention * batch
        seconds = max(busy, network * batch) + _tensor_seconds(arch, hardware, unit) * batch
        names = {
            "network": network * batch,
            "weights' bandwidth": read,
            "products": products,
            "cache": attention * batch,
        }
        return seconds, max(names, key=names.__getitem__)

    fits = (hardware.memory_gb * 1e9 * share - unit.weight_bytes) / cache
    low, high = 0.0, max(0.0, fits)
    if step(high)[0] <= 1 / speed:
        batch, limit = high, "memory for the cache"
    else:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if step(middle)[0] <= 1 / speed else (low, middle)
        batch, limit = low, step(low)[1]
    return Bound(batch / step(batch)[0], limit, batch) if batch >= 1 else None


@cache
def _day6_bounds() -> tuple[Bound, Bound]:
    """Of day 6 as it was: its model on its devices."""
    v3, h800 = load_recipe("v3-671b").model, find_hardware("h800")
    bounds = _bounds(from_model_config(v3), h800, "fp8", factor_table("serving"), v3.topk_group)
    assert bounds is not None
    return bounds


def delivered_shares(factors: Factors | None = None) -> tuple[float, float]:
    """(prefill, decode): what day 6 delivered over the bound of its model on its devices."""
    f = {name: factor.value for name, factor in (factors or factor_table("serving")).items()}
    prefill, decode = _day6_bounds()
    per_device = f["gpus_per_node"]
    computed = f["prefill_tokens_per_node_second"] * (1 - f["cached_tokens"] / f["input_tokens"])
    return (
        computed / per_device / prefill.tokens_per_second,
        f["decode_tokens_per_node_second"] / per_device / decode.tokens_per_second,
    )


def serving_cost(
    arch: Architecture,
    hardware: Hardware,
    precision: str,
    usd_per_hour: tuple[float, float, float],
    factors: Factors | None = None,
    node_limit: int | None = None,
) -> dict[str, Any]:
    """Dollars per million tokens, {low, mid, high}, of prompts and of output; `why_not` where it cannot be served.

    `node_limit`: most nodes that the experts of a token lie on, where the router limits them. Prompts count cached
    tokens too, at day 6's share of them, as day 6 does.
    """
    factors = factors or factor_table("serving")
    bounds = _bounds(arch, hardware, precision, factors, node_limit)
    if bounds is None:
        return {
            "why_not": f"no serving unit of {hardware.title} holds the model with one sequence at "
            f"{factors['stream_tokens_per_second'].value:g} tokens/s; prefill_expert_ranks and decode_expert_ranks "
            "are the devices of a unit"
        }
    cached = factors["cached_tokens"].value / factors["input_tokens"].value
    out: dict[str, Any] = {"like": "DeepSeek's day 6", "cached_share": cached}
    for name, bound, share in zip(("prefill", "decode"), bounds, delivered_shares(factors), strict=True):
        rate = bound.tokens_per_second * share / (1 - cached if name == "prefill" else 1)
        out[name] = {
            "tokens_per_second_per_gpu": rate,
            "bound_tokens_per_second_per_gpu": bound.tokens_per_second,
            "limit": bound.limit,
            "delivered_share_of_bound": share,
            "usd_per_million_tokens": dict(
                zip(("low", "mid", "high"), (usd / 3600 / rate * 1e6 for usd in usd_per_hour), strict=True)
            ),
        }
    out["decode"]["sequences_per_gpu"] = bounds[1].batch
    return out


def _bounds(
    arch: Architecture, hardware: Hardware, precision: str, factors: Factors, node_limit: int | None
) -> tuple[Bound, Bound] | None:
    f = {name: factor.value for name, factor in factors.items()}
    units = [
        serving_unit(arch, hardware, precision, int(f[name]), int(f["redundant_experts"]), f["memory_share"])
        for name in ("prefill_expert_ranks", "decode_expert_ranks")
    ]
    if units[0] is None or units[1] is None:
        return None
    decode = decode_bound(
        arch, hardware, precision, units[1], f["context_tokens"], f["stream_tokens_per_second"], f["memory_share"]
    )
    if decode is None:
        return None
    return prefill_bound(arch, hardware, precision, units[0], f["prompt_tokens"], node_limit), decode


def _core(precision: str) -> str:
    return "fp32" if precision == "fp32" else "bf16"


def _tensor_seconds(arch: Architecture, hardware: Hardware, unit: Unit) -> float:
    """Per token of a device, all layers: all-reduces over the fast link, which nothing hides."""
    if unit.layout.tensor == 1 or not hardware.nvlink_gb_s:
        return 0.0
    sent = tensor_bytes(arch, unit.layout) * unit.layout.tensor * arch.num_hidden_layers
    return sent / (hardware.nvlink_gb_s / 2 * 1e9)
