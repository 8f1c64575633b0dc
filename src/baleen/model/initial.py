"""How a model begins: each parameter a function of the seed and its name, so that ranks make their own parts alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from baleen.config import ModelConfig


def initial(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Normal with std initializer_range for every matrix, ones for norms, zeros for biases (V3 §4.2): float32 [shape].

    V3 "multiplies additional scaling factors at the width bottlenecks" (§4.2), behind the latents' norms, and does not
    give them. With mla_scale_lora they are sqrt(hidden_size / rank) (LongCat-Flash, arXiv 2509.01322), which the norms'
    weights begin with: what is made of a latent is then as large as if made of the whole hidden state. On the CPU,
    wherever the parameter lies and whatever its dtype. Of experts' stacks, give one expert at a time.
    """
    if name.endswith("norm.weight"):
        scaled = config.mla_scale_lora and name.endswith(("q_a_layernorm.weight", "kv_a_layernorm.weight"))
        return torch.full(shape, (config.hidden_size / shape[0]) ** 0.5 if scaled else 1.0, device="cpu")
    if name.endswith(".bias"):
        return torch.zeros(*shape, device="cpu")
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.empty(*shape, device="cpu").normal_(0.0, config.initializer_range, generator=generator)


@torch.no_grad()
def fill(parameter: Tensor, name: str, config: ModelConfig, seed: int, first_expert: int = 0) -> None:
    """Give `parameter` its initial numbers; of a stack of experts it may be a part, from `first_expert` on."""
    if ".experts." not in name:
        parameter.copy_(initial(name, parameter.shape, config, seed))
        return
    for number, expert in enumerate(parameter, first_expert):
        expert.copy_(initial(f"{name}.{number}", expert.shape, config, seed))
