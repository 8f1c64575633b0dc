"""Logits to tokens: bias, penalties, constraints, temperature, top-k, top-p and min-p, all places of a step at once.

A token is drawn by the Gumbel-max rule, argmax(logit / temperature + noise), with noise hashed from the request's seed,
the place in its answer and the token's id. So what is drawn is a function of the distribution and these three alone:
neither the batch nor the order of the work can change it, and a draft that is drawn with the noise of its place agrees
with the trunk's own draw as often as two distributions can without knowing of each other (arXiv 2408.07978).

Shapes: R places, Z = vocab_size, K candidates of a place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from baleen.config import UserError
from baleen.infer.native.library import native_library

NUCLEUS = 256  # candidates looked at first for top-k and top-p: sorting a whole vocabulary is slow and rarely needed
_MASK = (1 << 64) - 1


class Constraint(Protocol):
    """A language that the answer must be in."""

    def allowed(self, answer_ids: Sequence[int]) -> Tensor | None:
        """bool [Z] or shorter (what is missing is not allowed): tokens that may follow these; None: all may.

        At least one must be allowed, be it the end token.
        """
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn. The defaults draw from the model's own distribution until its end token.

    temperature: 0 is greedy, and so is anything below 1e-5. top_k: 0 is off. top_p, min_p: shares of probability; 1 and
    0 are off. seed: None takes one from the system. max_tokens: None is what the context and the cache leave. stop:
    strings that end the answer and are cut from it. stop_ids: tokens that do so besides the tokenizer's end token.
    ignore_eos: go on after that one.
    skip_special: leave control tokens out of the text; false shows all but the end token, for who parses them.

    logit_bias: added to the logits of these tokens. presence_penalty, frequency_penalty: taken from the logit of every
    token of the answer so far, once, and once for each time. constraint: keeps the answer in its language.

    logprobs: report the log-probability of each token of the answer and of this many likeliest ones; prompt_logprobs:
    of the prompt's tokens from position `prompt_logprobs_from` on, with which max_tokens may be 0. They are the
    model's own: of its logits as they come. trace: report which experts each token of the answer went to.
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
    skip_special: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0
    trace: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if 0 < self.temperature < 1e-5:  # by which 32 bits can't divide
            object.__setattr__(self, "temperature", 0.0)
        least = 1 if self.prompt_logprobs is None else 0
        for good, fault in (
            (0.0 <= self.temperature <= 100.0, f"temperature is {self.temperature}: take one from 0 (greedy) to 100"),
            (0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}: take a share above 0 and up to 1 (off)"),
            (self.top_k >= 0, f"top_k is {self.top_k}: take a number of tokens, or 0 (off)"),
            (0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}: take a share from 0 (off) to 1"),
            (
                self.max_tokens is None or self.max_tokens >= least,
                f"max_tokens is {self.max_tokens}: take 1 or more, or with prompt_logprobs 0",
            ),
            (all(self.stop), "a stop string is empty: leave it out, or give the text to stop at"),
            (
                all(map(math.isfinite, (self.presence_penalty, self.frequency_penalty, *self.logit_bias.values()))),
                "a penalty or a logit_bias is not finite: take numbers such as -100 or 100",
            ),
            ((self.logprobs or 0) >= 0, f"logprobs is {self.logprobs}: take how many likeliest tokens to report"),
            ((self.prompt_logprobs or 0) >= 0, f"prompt_logprobs is {self.prompt_logprobs}: take 0 or more"),
        ):
            if not good:
                raise UserError(fault)

    @cached_property
    def changes_logits(self) -> bool:
        """Whether anything but the temperature and what may not be drawn stands between the model and the draw."""
        return bool(self.logit_bias) or self.depends_on_answer

    @cached_property
    def depends_on_answer(self) -> bool:
        """Whether the tokens so far change the distribution otherwise than through the model."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.constraint is not None


class Place(NamedTuple):
    """One place of one answer that wants a token."""

    params: SamplingParams
    seed: int
    answer: Sequence[int]  # the tokens before it; read only if params.depends_on_answer
    index: int  # how many they are


def choose(logits_RZ: Tensor, places: Sequence[Place]) -> Tensor:
    """One token a place, int64 [R]; one whose logit is NaN where there is such. The logits are not changed."""
    logits_RZ = _adjusted(logits_RZ, places)
    ways: dict[Callable[[Tensor, Sequence[Place]], Tensor], list[int]] = {}
    for r, (params, *_) in enumerate(places):
        nucleus = params.top_k or params.top_p < 1
        way = _greedy if params.temperature == 0 else _draw_from_best if nucleus else _draw_from_all
        ways.setdefault(way, []).append(r)
    if len(ways) == 1:
        (draw,) = ways
        return draw(logits_RZ, places)
    tokens_R = torch.empty(len(places), dtype=torch.long, device=logits_RZ.device)
    for draw, rows in ways.items():
        tokens_R[rows] = draw(logits_RZ[rows], [places[r] for r in rows])
    return tokens_R


def _greedy(logits_RZ: Tensor, places: Sequence[Place]) -> Tensor:
    return logits_RZ.argmax(-1)


def _draw_from_all(logits_RZ: Tensor, places: Sequence[Place]) -> Tensor:
    """Gumbel-max over the vocabulary, less what min_p forbids."""
    fits = logits_RZ.dtype == torch.float32 and logits_RZ.device.type == "cpu" and logits_RZ.stride(1) == 1
    library = native_library() if fits and not any(place.params.min_p for place in places) else None
    if library is not None:
        temperatures_R = torch.tensor([place.params.temperature for place in places])
        return library.draw(logits_RZ, temperatures_R, _keys(places, logits_RZ.device))
    scaled_RZ = _scaled(logits_RZ, places)
    ids_Z = torch.arange(scaled_RZ.shape[1], dtype=torch.int32, device=scaled_RZ.device)
    scores_RZ = gumbel(_keys(places, scaled_RZ.device), ids_Z) + scaled_RZ
    if any(place.params.min_p for place in places):
        least_R1 = scaled_RZ.amax(-1, keepdim=True) + _column([_log(p.params.min_p) for p in places], scaled_RZ)
        scores_RZ = scores_RZ.masked_fill(scaled_RZ < least_R1, -math.inf)
    return scores_RZ.argmax(-1)


def _draw_from_best(logits_RZ: Tensor, places: Sequence[Place], width: int = NUCLEUS) -> Tensor:
    """The top k; of those the fewest that reach top p; of those all with min p times the probability of the best.

    Looks at the `width` best only; places at which these are not enough are drawn once more, from all.
    """
    scaled_RZ = _scaled(logits_RZ, places)
    Z = scaled_RZ.shape[1]
    width = min(width, Z)
    top_k_R1 = _column([min(place.params.top_k or Z, Z) for place in places], scaled_RZ)
    top_p_R1 = _column([place.params.top_p for place in places], scaled_RZ)
    best_RK, ids_RK = scaled_RZ.topk(width, dim=-1)
    probs_RK = (best_RK - scaled_RZ.logsumexp(-1, keepdim=True)).exp()
    kept_RK = torch.arange(width, device=scaled_RZ.device) < top_k_R1
    reached_RK = (probs_RK * kept_RK).cumsum(-1)
    # The share is one of the top k's sum: known if they are all here, and 1 if they are everything.
    is_known_R1 = top_k_R1 <= width
    goal_R1 = top_p_R1 * torch.where(is_known_R1, reached_RK[:, -1:], 1.0)
    is_enough_R1 = is_known_R1 | ((top_k_R1 == Z) & (top_p_R1 < 1) & (reached_RK[:, -1:] >= goal_R1))
    kept_RK &= (reached_RK - probs_RK * kept_RK < goal_R1) | (top_p_R1 == 1)
    kept_RK &= probs_RK >= _column([place.params.min_p for place in places], scaled_RZ) * probs_RK[:, :1]
    scores_RK = gumbel(_keys(places, scaled_RZ.device), ids_RK.int()) + best_RK
    at_R1 = scores_RK.masked_fill_(~kept_RK, -math.inf).argmax(-1, keepdim=True)
    tokens_R = ids_RK.gather(1, at_R1).squeeze(1)
    again = [r for r, is_enough in enumerate(is_enough_R1[:, 0].tolist()) if not is_enough]
    if again:
        tokens_R[again] = _draw_from_best(logits_RZ[again], [places[r] for r in again], Z)
    return tokens_R


def _scaled(logits_RZ: Tensor, places: Sequence[Place]) -> Tensor:
    """By temperature, in 32 bits or more."""
    wide_RZ = logits_RZ.to(torch.promote_types(logits_RZ.dtype, torch.float32))
    return wide_RZ / _column([place.params.temperature for place in places], wide_RZ)


def _adjusted(logits_RZ: Tensor, places: Sequence[Place]) -> Tensor:
    """With biases, penalties and constraints; a copy if there are any."""
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    masks: dict[int, Tensor] = {}
    if not any(place.params.changes_logits for place in places):
        return logits_RZ
    for r, (params, _, answer, _) in enumerate(places):
        if not params.changes_logits:
            continue
        changes = dict(params.logit_bias)
        if params.presence_penalty or params.frequency_penalty:
            for id, times in Counter(answer).items():
                changes[id] = changes.get(id, 0.0) - params.presence_penalty - params.frequency_penalty * times
        rows += [r] * len(changes)
        ids += changes.keys()
        values += changes.values()
        mask = None if params.constraint is None else params.constraint.allowed(answer)
        if mask is not None:
            assert mask.any(), "the constraint allows no token, not even the end"
            masks[r] = mask
    if not rows and not masks:
        return logits_RZ
    logits_RZ = logits_RZ.clone()
    if rows:
        index = (torch.tensor(rows, device=logits_RZ.device), torch.tensor(ids, device=logits_RZ.device))
        logits_RZ.index_put_(index, torch.tensor(values, dtype=logits_RZ.dtype, device=logits_RZ.device), True)
    for r, mask in masks.items():
        logits_RZ[r, len(mask) :] = -math.inf
        logits_RZ[r, : len(mask)].masked_fill_(~mask[: logits_RZ.shape[1]].to(logits_RZ.device), -math.inf)
    return logits_RZ


# --- noise


def gumbel(keys_R2: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [R, Z], for keys int32 [R, 2] and token ids int32 [Z] or [R, Z].

    A hash of 32 bits (the multipliers and shifts of Wellons' lowbias32, the second half of the key mixed in midway),
    read as the distribution function of an exponential E; the noise is -ln E, from -2.8 to 22.
    """
    x = ids * _int32(0x9E3779B9) + keys_R2[:, :1]
    _xorshift(x, 16)
    x *= _int32(0x7FEB352D)
    _xorshift(x, 15)
    x ^= keys_R2[:, 1:]
    x *= _int32(0x846CA68B)
    _xorshift(x, 16)
    # Small shares make large noise, so it is there that precision counts; at 1 the logarithm would be infinite.
    share = (x & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return share.neg_().log1p_().neg_().log_().neg_()


def _xorshift(x: Tensor, shift: int) -> None:
    """x ^= x >> shift, in place, as if it had no sign."""
    shifted = x >> shift
    shifted &= (1 << (32 - shift)) - 1
    x ^= shifted


def _keys(places: Sequence[Place], device: torch.device) -> Tensor:
    """int32 [R, 2]: the lower and the upper half of a hash of seed and index."""
    seeds_R = np.array([place.seed & _MASK for place in places], dtype=np.uint64)
    indices_R = np.array([place.index for place in places], dtype=np.uint64)
    keys_R = mixed(mixed(seeds_R) + indices_R)
    return torch.from_numpy(keys_R.astype("<u8", copy=False).view(np.int32).reshape(-1, 2)).to(device)


def mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64 of uint64: a bijection whose every output bit depends on every input bit."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def _int32(x: int) -> int:
    """The signed number with these 32 bits."""
    return x - (1 << 32) if x >> 31 else x


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _log(share: float) -> float:
    return math.log(share) if share else -math.inf
