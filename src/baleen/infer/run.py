"""One request on its way through the engine: what it reads in a step, and what becomes of what was drawn for it.

Shapes: N tokens of a step, d hidden, K experts of a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from baleen.infer.request import Event, Logprob, Request
from baleen.infer.sampler import Place
from baleen.infer.scheduler import Job
from baleen.infer.speculative import Window
from baleen.infer.text import Answer


class Span(NamedTuple):
    """The `count` tokens from row `first` on that one request reads in a step."""

    first: int
    count: int
    is_last: bool  # after them a token is drawn


@dataclass(eq=False, slots=True)
class Run:
    job: Job
    request: Request
    answer: Answer
    seed: int
    depth: int  # drafts a step, at most
    adaptive: bool  # drafts only where they pay
    sink: deque[Event] | None  # where its events go, if not to the caller of `Engine.step`
    span: Span = Span(0, 0, False)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    traced: int = 0  # tokens of the answer whose experts have been reported
    scores_prompt: bool = field(init=False)
    read_along: bool = False  # whether the MTP layers have read all of this step's tokens
    tail_Td: Tensor | None = None  # the drafter's, of the tokens before position `tail_end`
    tail_end: int = 0

    def __post_init__(self) -> None:
        self.scores_prompt = self.request.params.prompt_logprobs is not None

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    def read(self, first: int, count: int) -> list[int]:
        """Begin a step: the tokens that stand in its rows from `first` on."""
        job = self.job
        self.span = Span(first, count, count >= job.remaining)
        if count == 1:
            return [job.tokens[job.computed]]
        return [*job.tokens[job.computed :], *job.drafts][:count]

    # --- what it wants of the step

    def places(self) -> list[Place]:
        """That of the next token, and those behind each draft."""
        if not self.span.is_last or self.answer.max_tokens == 0:
            return []
        params, said = self.request.params, self.answer.count
        answer = self.job.tokens[self.prompt_length :] if params.depends_on_answer else ()
        places = [Place(params, self.seed, answer, said)]
        for _ in self.job.drafts:
            places.append(places[-1]._replace(index=places[-1].index + 1))
        return places

    def place_rows(self) -> range:
        """The rows whose logits `places` are drawn from."""
        end = self.span.first + self.span.count
        return range(end - 1 - len(self.job.drafts), end)

    def scored_rows(self) -> tuple[range, list[int]]:
        """Rows after which a prompt token stands whose log-probability is wanted, and those tokens."""
        wanted = max(1, self.request.params.prompt_logprobs_from) + len(self.prompt_logprobs)
        start = max(wanted, self.job.computed + 1)
        stop = min(self.prompt_length, self.job.computed + self.span.count + 1)
        shift = self.span.first - self.job.computed - 1
        return range(start + shift, max(start, stop) + shift), self.job.tokens[start:stop]

    # --- what it got

    def move_on(self, drawn: Sequence[int], logprobs: Sequence[Logprob], experts: Sequence[Tensor]) -> Event:
        """Keep the drafts that were drawn again and the token after them; the event says what that means."""
        job, drafts, params = self.job, self.job.drafts, self.request.params
        kept = 0
        while kept < len(drafts) and drafts[kept] == drawn[kept]:
            kept += 1
        is_first = self.answer.count == 0
        text, used, reason = self.answer.feed(drawn[: kept + 1])
        job.tokens += drawn[:used]
        job.drafts = []
        if drafts:
            true = min(self.span.count - len(drafts) + kept, len(job.tokens) - job.computed)
            self.span = self.span._replace(count=true)
        scored = is_first and params.prompt_logprobs is not None
        return Event(  # by position, as one is made for every token
            job.id,
            text,
            tuple(drawn[:used]),
            min(used, kept),
            reason,
            len(drafts),
            job.cached,
            tuple(logprobs[:used]) if drawn and params.logprobs is not None else None,
            tuple(self.prompt_logprobs) if scored else None,
            self._routes(experts) if params.trace else None,
        )

    def window(self) -> Window:
        """What the drafter may read after a step, and how many drafts it should make for the next."""
        span, job = self.span, self.job
        tail_Td = self.tail_Td if self.tail_end == job.computed else None  # it may have given way since
        window = Window(job.tokens, job.computed, span.first, span.count, job.pages, tail_Td=tail_Td)
        if span.is_last:
            said = self.answer.count
            window.place = Place(self.request.params, self.seed, (), said)
            window.wanted = min(self.depth, self.answer.max_tokens - said - 1)  # the step after brings one more
        return window

    def _routes(self, experts: Sequence[Tensor]) -> Tensor | None:
        """Of the tokens of the answer that this step has read for the first time."""
        start = max(self.job.computed, self.prompt_length + self.traced)
        count = self.job.computed + self.span.count - start
        if count <= 0 or not experts:
            return None
        self.traced += count
        row = self.span.first + start - self.job.computed
        return torch.stack([layer_NK[row : row + count] for layer_NK in experts], 1).to("cpu", torch.int32)
