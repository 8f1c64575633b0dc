"""Statistics of a Llama's hidden states on text, for forms of it that are only nearly the same function.

Taken on its exact V3 form in which every query head hands on the values of all key heads (`wide_attention`), so that
o_proj's input shows each attention pattern applied to all of them. Shapes: D hidden, R values of all key heads.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn

from baleen.interop.llama import LlamaSource
from baleen.model.transformer import Transformer

TOKENS, WINDOW = 6144, 512


class Moments(NamedTuple):
    """Of one layer, over tokens, float64."""

    input_mean_D: Tensor  # of what the attention reads, after its norm
    input_second_DD: Tensor  # E[x x^T]
    value_mean_R: Tensor  # of the attention-averaged values y = sum_t A_t v_t, over the query heads too
    value_second_RR: Tensor  # E[y y^T]


def calibrate(model: Transformer, llama: LlamaSource) -> list[Moments]:
    """One entry a layer of the wide form, from the first 6,144 tokens of Python's own documentation."""
    shape = llama.shape
    sums = [_Sums(shape.num_key_value_heads * shape.head_dim) for _ in model.trunk_layers]
    for layer, total in zip(model.trunk_layers, sums, strict=True):
        layer.input_layernorm.register_forward_hook(total.read_inputs)
        layer.self_attn.o_proj.register_forward_pre_hook(total.read_values)
    ids = llama.tokenizer().encode("\n\n".join(topics.values()))[:TOKENS]
    ids = [min(id, shape.vocab_size - 1) for id in ids]
    window = min(WINDOW, model.config.max_position_embeddings)
    with torch.inference_mode():
        for start in range(0, len(ids), window):
            model(torch.tensor([ids[start : start + window]]))
    return [total.moments() for total in sums]


class _Sums:
    def __init__(self, values: int):
        self.R = values
        self.inputs, self.values = _Sum(), _Sum()

    def read_inputs(self, module: nn.Module, args: tuple[Tensor, ...], x_BTD: Tensor) -> None:
        self.inputs.add(x_BTD.flatten(0, 1))

    def read_values(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.values.add(args[0].reshape(-1, self.R))

    def moments(self) -> Moments:
        return Moments(*self.inputs.means(), *self.values.means())


class _Sum:
    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, x_NX: Tensor) -> None:
        x = x_NX.double()
        self.count += len(x)
        self.first = self.first + x.sum(0)
        self.second = self.second + x.t() @ x

    def means(self) -> tuple[Tensor, Tensor]:
        return self.first / self.count, self.second / self.count
