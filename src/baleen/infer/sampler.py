"""Logits to tokens: temperature, top-k, top-p and min-p, with a random stream of its own for every request.

Shapes: B requests, K places of each (1, or the drafts to verify and one more), Z = vocab_size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baleen.config import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn. The defaults draw from the model's own distribution until its end token.

    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: shares of probability; 1 and 0 are off. seed: None takes
    one from the system. max_tokens: None is what the context leaves. stop: strings that end the answer and are cut
    from it. stop_ids: tokens that do so besides the tokenizer's end token. ignore_eos: go on after that one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for good, fault in (
            (0.0 <= self.temperature <= 100.0, f"temperature is {self.temperature}: take one from 0 (greedy) to 100"),
            (0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}: take a share above 0 and up to 1 (off)"),
            (self.top_k >= 0, f"top_k is {self.top_k}: take a number of tokens, or 0 (off)"),
            (0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}: take a share from 0 (off) to 1"),
            (self.max_tokens is None or self.max_tokens >= 1, f"max_tokens is {self.max_tokens}: take 1 or more"),
            (all(self.stop), "a stop string is empty: leave it out, or give the text to stop at"),
        ):
            if not good:
                raise UserError(fault)


class Sampler:
    """The sampling parameters of B requests as tensors, and their random streams.

    A request takes a fixed number of random numbers a step from the stream of its own seed, so what it draws does not
    depend on what else is in the batch.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu"):
        self._temperature_B = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
        self._top_k_B = torch.tensor([p.top_k for p in params], device=device)
        self._top_p_B = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        self._min_p_B = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device)
        self._streams = [random.Random(p.seed) for p in params]  # None: the system's entropy
        self._params = list(params)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these requests, in this order."""
        index = torch.tensor(rows, dtype=torch.long, device=self._top_k_B.device)
        self._temperature_B, self._top_k_B = self._temperature_B[index], self._top_k_B[index]
        self._top_p_B, self._min_p_B = self._top_p_B[index], self._min_p_B[index]
        self._streams = [self._streams[row] for row in rows]
        self._params = [self._params[row] for row in rows]

    def uniforms(self, count: int) -> Tensor:
        """The next `count` numbers of every stream, float64 [B, count] in [0, 1)."""
        numbers = [[stream.random() for _ in range(count)] for stream in self._streams]
        return torch.tensor(numbers, dtype=torch.float64).view(-1, count).to(self._top_k_B.device)

    def probabilities(self, logits_BKZ: Tensor) -> Tensor:
        """Logits -> the distribution that is drawn from, float64 [B, K, Z]; see `probabilities`.

        Trunk and MTP layers both pass through here: speculation is lossless only if both are processed alike.
        """
        if all(p.temperature == 0 for p in self._params):
            return one_hot_argmax(logits_BKZ)
        return probabilities(
            logits_BKZ,
            self._temperature_B,
            self._top_k_B if any(p.top_k for p in self._params) else None,
            self._top_p_B if any(p.top_p < 1 for p in self._params) else None,
            self._min_p_B if any(p.min_p for p in self._params) else None,
        )


def probabilities(
    logits_BKZ: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor | None = None,
    top_p_B: Tensor | None = None,
    min_p_B: Tensor | None = None,
) -> Tensor:
    """Divide by the temperature, then keep the top k, of those the fewest that reach top p, of those all with at least
    min p times the probability of the best; renormalise. Temperature 0: all on the best token.

    [B, K, Z] -> float64 [B, K, Z]. A processor that no request uses is None and costs nothing.
    """
    greedy_B11 = (temperature_B == 0)[:, None, None]
    temperature_B11 = temperature_B[:, None, None].masked_fill(greedy_B11, 1.0)
    probs = (logits_BKZ.double() / temperature_B11).softmax(-1)
    if top_k_B is not None or top_p_B is not None:
        sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
        if top_k_B is not None:
            rank_Z = torch.arange(probs.shape[-1], device=probs.device)
            beyond = (rank_Z >= top_k_B[:, None, None]) & (top_k_B > 0)[:, None, None]
            sorted_probs = sorted_probs.masked_fill(beyond, 0.0)
        if top_p_B is not None:
            before = sorted_probs.cumsum(-1) - sorted_probs
            enough = before >= top_p_B[:, None, None] * sorted_probs.sum(-1, keepdim=True)
            enough &= (top_p_B < 1)[:, None, None]
            sorted_probs = sorted_probs.masked_fill(enough, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs)
    if min_p_B is not None:
        least = min_p_B[:, None, None] * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.where(greedy_B11, one_hot_argmax(logits_BKZ), probs)


def one_hot_argmax(logits: Tensor) -> Tensor:
    """Greedy choice as a distribution, float64, the shape of `logits`."""
    return torch.zeros_like(logits, dtype=torch.float64).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def draw(weights_BZ: Tensor, uniform_B: Tensor) -> Tensor:
    """One token a row by the inverse of its distribution function; weights need not add up to 1. int64 [B]."""
    cumulative_BZ = weights_BZ.cumsum(-1)
    # u < 1 in float64 keeps the target below the total, so a token without weight is never drawn.
    target_B1 = uniform_B[:, None] * cumulative_BZ[:, -1:]
    return torch.searchsorted(cumulative_BZ, target_B1, right=True).squeeze(-1)
