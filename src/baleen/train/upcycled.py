"""What the training of upcycled models must mind: constants that stay, and copies of experts that are to part."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from baleen.model.layer import DecoderLayer
from baleen.model.moe import DeepseekMoE, Gate
from baleen.model.transformer import Transformer


def keep_constants(model: Transformer) -> None:
    """Gradients of 0 for the constants that make a latent's norm an identity.

    They are the coordinates whose norm weight is exactly 0, as only upcycling makes them: that weight and the bias.
    """
    for layer in [*model.trunk_layers, *model.mtp_layers]:
        attention = layer.self_attn
        bias, norm = attention.kv_a_proj_with_mqa.bias, attention.kv_a_layernorm.weight
        if bias is None or bool((norm != 0).all()):
            continue
        learns_norm = (norm != 0).detach().clone()
        learns_bias = torch.cat((learns_norm, learns_norm.new_ones(len(bias) - len(norm))))
        for parameter, learns in ((norm, learns_norm), (bias, learns_bias)):
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, learns=learns: gradient * learns)


def jitter_routers(gates: Iterable[Gate], amount: float) -> None:
    """In training mode each of them reads its input times a random 1 +- amount (Switch, arXiv 2101.03961 §2.2).

    Tokens then reach either copy of an expert, and copies learn different things.
    """
    for gate in gates if amount else ():
        gate.register_forward_pre_hook(lambda gate, args: _jittered(gate.training, args, amount))


def _jittered(training: bool, args: tuple[Tensor, ...], amount: float) -> tuple[Tensor, ...]:
    if not training:
        return args
    x, *rest = args
    noise = torch.empty_like(x, device="cpu").uniform_(1 - amount, 1 + amount)  # by the generator that is resumed
    return (x * noise.to(x.device), *rest)


@torch.no_grad()
def part_experts(layers: Iterable[DecoderLayer], amount: float, seed: int) -> None:
    """Add noise to the routed experts, `amount` times the spread of each matrix's own weights.

    Fine-tuning moves weights by a hundredth of their size, so copies that are only trained on stay alike for long;
    sparse upcycling re-initialises some of them (arXiv 2502.19261). cos = 1 / (1 + amount²) is left of two copies.
    """
    if not amount:
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for stack in layer.mlp.experts.parameters() if isinstance(layer.mlp, DeepseekMoE) else ():
            for expert in stack:
                noise = torch.empty(expert.shape, device="cpu").normal_(generator=generator)
                expert += amount * expert.std() * noise.to(expert)


@torch.no_grad()
def closest_experts(layers: Iterable[DecoderLayer]) -> float | None:
    """The largest cosine between two experts of one of the layers, over all their weights: 1.0 where one is a copy.

    None where no layer has experts.
    """
    largest = None
    for layer in layers:
        if isinstance(layer.mlp, DeepseekMoE):
            experts = layer.mlp.experts
            rows = torch.cat((experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)), 1)
            rows = torch.nn.functional.normalize(rows.double(), dim=1)
            cosines = (rows @ rows.t()).fill_diagonal_(-1.0)
            largest = max(float(cosines.max()), -1.0 if largest is None else largest)
    return largest
