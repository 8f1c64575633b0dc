"""Requests to answers: one or many at once, as a stream of events.

A request's life: checked against the model's context, prefilled together with the others, decoded step by step in one
batch, turned into text, and dropped from the batch at its end token, its stop string or its length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from baleen.config import UserError
from baleen.data.tokenizer import Tokenizer
from baleen.infer.decoder import Decoder
from baleen.infer.sampler import SamplingParams
from baleen.infer.text import Detokenizer, StopMatcher
from baleen.model.transformer import Transformer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    prompt_ids: Sequence[int]
    params: SamplingParams = SamplingParams()


@dataclass(frozen=True)
class Event:
    """What one step brought one request: `request` is its index. Text may lag behind the tokens, never run ahead."""

    request: int
    text: str
    token_ids: tuple[int, ...]  # the end token included
    accepted: int  # how many of them, from the first, are drafts that were kept
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass
class Stats:
    """Counts over one generation. `turns` counts each sequence at each decode step, prefill left out."""

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0  # forwards of the trunk after prefill
    turns: int = 0
    accepted: list[int] = field(default_factory=list)  # per depth: drafts kept, of `turns` drafted
    seconds: float = 0.0

    @property
    def drafted(self) -> list[int]:
        """Drafts made, per depth."""
        return [self.turns] * len(self.accepted)

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts kept, per depth; a draft after a refused one counts as refused."""
        return [accepted / self.turns if self.turns else 0.0 for accepted in self.accepted]

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one forward of the trunk brings a sequence: 1 + the acceptances of all depths."""
        return 1.0 + sum(self.acceptance)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all requests over the time of prefill and decoding together."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Engine:
    """A model and its tokenizer, ready to answer."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that a sequence may have."""
        return self.model.config.max_position_embeddings

    def generate(self, requests: Sequence[Request], *, speculate: int = 0) -> Generation:
        """Answer all requests in one batch; iterate over the result for events, then read its `stats`.

        speculate: how many tokens the MTP layers draft ahead, 0 to num_nextn_predict_layers; greedy answers
        stay the same, drawn ones follow the same distribution. Raises UserError at once for a prompt that does not fit.
        """
        return Generation(self, requests, speculate)

    def complete(self, requests: Sequence[Request], *, speculate: int = 0) -> list[Completion]:
        """The whole answers, in the order of the requests."""
        texts = [""] * len(requests)
        ids: list[tuple[int, ...]] = [()] * len(requests)
        reasons: list[FinishReason] = ["length"] * len(requests)
        for event in self.generate(requests, speculate=speculate):
            texts[event.request] += event.text
            ids[event.request] += event.token_ids
            reasons[event.request] = event.finish_reason or reasons[event.request]
        return [Completion(*parts) for parts in zip(texts, ids, reasons, strict=True)]


class Generation:
    """A batch on its way: an iterator of events that can be abandoned at any time."""

    def __init__(self, engine: Engine, requests: Sequence[Request], speculate: int):
        config = engine.model.config
        if not 0 <= speculate <= config.num_nextn_predict_layers:
            raise UserError(
                f"asked to draft {speculate} tokens ahead, but the model has {config.num_nextn_predict_layers} MTP "
                f"layers: take 0 (off) to {config.num_nextn_predict_layers}"
            )
        for request in requests:
            _check_prompt(request.prompt_ids, engine.context, config.vocab_size)
        self._engine, self._depth = engine, speculate
        self._answers = [_Answer(i, r, engine) for i, r in enumerate(requests)]
        self.stats = Stats(sum(len(r.prompt_ids) for r in requests), accepted=[0] * speculate)

    def __iter__(self) -> Iterator[Event]:
        active = self._answers
        if not active:
            return
        started = time.perf_counter()
        decoder = Decoder(
            self._engine.model,
            [answer.request.prompt_ids for answer in active],
            [answer.request.params for answer in active],
            depth=self._depth,
        )
        new_tokens = decoder.prefill()
        while True:
            events = [answer.feed(tokens) for answer, tokens in zip(active, new_tokens, strict=True)]
            self.stats.tokens += sum(len(event.token_ids) for event in events)
            self.stats.seconds += time.perf_counter() - started
            yield from events
            started = time.perf_counter()
            kept = [row for row, event in enumerate(events) if event.finish_reason is None]
            if not kept:
                return
            if len(kept) < len(active):
                active = [active[row] for row in kept]
                decoder.select(kept)
            new_tokens = decoder.step()
            self._count(new_tokens)

    def _count(self, new_tokens: list[list[int]]) -> None:
        self.stats.steps += 1
        self.stats.turns += len(new_tokens)
        for depth in range(self._depth):
            self.stats.accepted[depth] += sum(len(tokens) > depth + 1 for tokens in new_tokens)


class _Answer:
    """The text side of one request: what its tokens say, and when it ends."""

    def __init__(self, index: int, request: Request, engine: Engine):
        room = engine.context - len(request.prompt_ids)
        params = request.params
        self.index, self.request = index, request
        self.max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self._end_ids = {*params.stop_ids} if params.ignore_eos else {engine.tokenizer.eos_id, *params.stop_ids}
        self._detokenizer = Detokenizer(engine.tokenizer)
        self._matcher = StopMatcher(params.stop)
        self._count = 0

    def feed(self, tokens: Sequence[int]) -> Event:
        """Take the tokens of one step up to the one that ends the answer."""
        text, reason = "", None
        used = 0
        while reason is None and used < len(tokens):
            token = tokens[used]
            used += 1
            if token in self._end_ids:
                reason = "stop"
            else:
                text += self._matcher.feed(self._detokenizer.feed([token]))
                if self._matcher.stopped:
                    reason = "stop"
                elif self._count + used == self.max_tokens:
                    reason = "length"
        self._count += used
        if reason is not None:
            text += self._matcher.feed(self._detokenizer.flush()) + self._matcher.flush()
        return Event(self.index, text, tuple(tokens[:used]), min(used, len(tokens) - 1), reason)


def _check_prompt(prompt_ids: Sequence[int], context: int, vocab_size: int) -> None:
    if not prompt_ids:
        raise UserError("the prompt is empty: give at least one token, such as the beginning-of-text token")
    if len(prompt_ids) >= context:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, but the model's context holds {context}, answer included: "
            "shorten the prompt"
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise UserError(
            f"the prompt has token ids from {min(prompt_ids)} to {max(prompt_ids)}, outside the model's vocabulary of "
            f"{vocab_size}: encode it with the model's own tokenizer"
        )
