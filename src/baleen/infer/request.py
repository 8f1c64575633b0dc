"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from baleen.infer.sampler import SamplingParams

FinishReason = Literal["stop", "length", "timeout"]  # timeout: waited too long in the queue and was never started


@dataclass(frozen=True)
class Request:
    prompt_ids: Sequence[int]
    params: SamplingParams = SamplingParams()


class Logprob(NamedTuple):
    """Natural logarithms of the model's own probabilities."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, best first


class Event(NamedTuple):
    """What one step brought one request, named by its number. Text may lag behind the tokens, never run ahead.

    logprobs: one for each of `token_ids`. prompt_logprobs: in the event that ends the reading of the prompt. routes:
    int32 [n, MoE layers, K], the experts of the next n tokens of the answer; each token is reported in the step that
    reads it, so the last one of an answer never is.
    """

    request: int
    text: str
    token_ids: tuple[int, ...]  # the end token included
    accepted: int  # how many of them, from the first, are drafts that were kept
    finish_reason: FinishReason | None
    drafted: int = 0  # drafts that this step verified
    cached_tokens: int = 0  # of the prompt, whose latents were there already
    logprobs: tuple[Logprob, ...] | None = None
    prompt_logprobs: tuple[Logprob, ...] | None = None
    routes: Tensor | None = None


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    cached_tokens: int = field(default=0, compare=False)
    logprobs: tuple[Logprob, ...] | None = None
    prompt_logprobs: tuple[Logprob, ...] | None = None


@dataclass
class Stats:
    """Counts over one generation. `turns` counts each sequence at each decode step, prefill left out."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    turns: int = 0
    drafted: list[int] = field(default_factory=list)  # per depth: drafts made
    accepted: list[int] = field(default_factory=list)  # per depth: drafts kept
    seconds: float = 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts kept, per depth; a draft after a refused one counts as refused."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return [accepted / drafted if drafted else 0.0 for accepted, drafted in pairs]

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one forward of the trunk brings a sequence: 1, and the drafts kept."""
        return 1.0 + sum(self.accepted) / self.turns if self.turns else 1.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all requests over the time of prefill and decoding together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def count(self, accepted: int, drafted: int) -> None:
        """One sequence at one decode step."""
        self.turns += 1
        for depth in range(drafted):
            self.drafted[depth] += 1
            self.accepted[depth] += accepted > depth
