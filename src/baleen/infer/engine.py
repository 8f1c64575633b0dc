"""Requests to answers, many at once: continuous batching over one paged latent cache.

docs/life-of-a-request.md tells the life of a request. What is answered does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from baleen.config import UserError
from baleen.data.tokenizer import Tokenizer
from baleen.infer.native.runner import fastest_runner
from baleen.infer.pages import PagePool
from baleen.infer.request import Completion, Event, Logprob, Request, Stats
from baleen.infer.run import Run
from baleen.infer.runner import Runner
from baleen.infer.scheduler import Busy, Job, Scheduler, check_fits
from baleen.infer.speculative import Drafter
from baleen.infer.step import Stepper
from baleen.infer.text import Answer, Spelling
from baleen.model.cache import LatentPages
from baleen.model.transformer import Transformer

__all__ = ["Busy", "Completion", "Engine", "Event", "Generation", "Logprob", "Request", "Stats"]

PAGE_SIZE = 16  # tokens
MAX_CACHE_BYTES = 2**30  # unless cache_tokens says otherwise; memory is taken only as it is used

Speculate = int | Literal["auto"]


class Engine:
    """A model and its tokenizer, ready to answer, with the weights as they are now. For one thread at a time.

    tokenizer: None to work with token ids alone; answers then end at the model's own end token.

    context: tokens of prompt and answer together that a sequence may have; None: as many as the model was made for.
    cache_tokens: tokens of all requests that the cache holds; None: `max_batch` full contexts, but no more than a
    GiB. max_batch: answers under way at once. prefill_chunk: tokens of prompts that a step reads. max_queue,
    queue_seconds: bounds of the queue, None for none. speculate: drafts a step for submitted requests; "auto": as deep
    as the model was trained for, and only while it pays. runner: what computes, by default the fastest there is. clock:
    seconds.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        context: int | None = None,
        cache_tokens: int | None = None,
        max_batch: int = 256,
        prefill_chunk: int = 512,
        max_queue: int | None = None,
        queue_seconds: float | None = None,
        speculate: Speculate = 0,
        page_size: int = PAGE_SIZE,
        runner: Callable[[Transformer, LatentPages], Runner] = fastest_runner,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self._tokenizer = model, tokenizer
        self._spellings = {skip: None if tokenizer is None else Spelling(tokenizer, skip) for skip in (True, False)}
        config = model.config
        self.context = config.max_position_embeddings if context is None else context
        if self.context > config.max_position_embeddings:
            raise UserError(f"context {context} is more than the model's, {config.max_position_embeddings}")
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UserError(f"{name} is {value}: take 1 or more")
        self._speculate: Speculate = self._depth_of(speculate)
        with torch.inference_mode():
            like = {"dtype": model.model.norm.weight.dtype, "device": model.device}
            if cache_tokens is None:
                on_cpu = model.device.type == "cpu"  # where a runner may widen 16 bits
                dtype = torch.promote_types(like["dtype"], torch.float32) if on_cpu else like["dtype"]
                one = LatentPages(config, 1, page_size=page_size, mtp=True, dtype=dtype)
                affordable = MAX_CACHE_BYTES // one.bytes_per_token
                cache_tokens = max(self.context, min(max_batch * self.context, affordable))
            count = -(-cache_tokens // page_size)
            made = runner(model, LatentPages(config, count, page_size=page_size, mtp=True, **like))
        self.pages = PagePool(count, page_size)
        self._scheduler = Scheduler(
            self.pages,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            max_queue=max_queue,
            queue_seconds=queue_seconds,
            clock=clock,
        )
        depth = config.num_nextn_predict_layers
        self._stepper = Stepper(made, Drafter(made, depth) if depth else None)
        self._clock = clock
        self._runs: dict[int, Run] = {}
        self._unclaimed: list[Event] = []  # of submitted requests, while a `Generation` took the steps
        self._next_id = 0

    # --- what there is

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "this engine works with token ids alone"
        return self._tokenizer

    @property
    def has_work(self) -> bool:
        return bool(self._runs or self._unclaimed)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    # --- requests

    def submit(self, request: Request) -> int:
        """Queue a request and name it. Raises Busy if the queue is full, UserError for what can never be answered."""
        return self._submit(request, self._speculate, None)

    def abort(self, id: int) -> None:
        """Give a request up: its pages are free at once and no event of it follows. Finished ones are left alone."""
        run = self._runs.pop(id, None)
        if run is not None:
            self._scheduler.remove(run.job)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward of the trunk: every answer moves on, and some of the prompts are read. Events in no order."""
        events = [self._expire(job) for job in self._scheduler.expired()]
        plan = [(self._runs[job.id], count) for job, count in self._scheduler.plan()]
        if plan:
            events += self._stepper.step(plan)
        for run, _ in plan:
            self._scheduler.advance(run.job, run.job.computed + run.span.count)
        mine, self._unclaimed = self._unclaimed, []
        for run, event in events:
            if event.finish_reason is not None:
                self.abort(run.job.id)
            (mine if run.sink is None else run.sink).append(event)
        return mine

    def generate(self, requests: Sequence[Request], *, speculate: Speculate = 0) -> Generation:
        """Answer all requests; iterate over the result for events, whose `request` is the index, then read its `stats`.

        speculate: how many tokens the MTP layers draft ahead, 0 to num_nextn_predict_layers, or "auto"; answers
        stay the same. Raises UserError at once for a prompt that does not fit.
        """
        return Generation(self, requests, self._depth_of(speculate))

    def complete(self, requests: Sequence[Request], *, speculate: Speculate = 0) -> list[Completion]:
        """The whole answers, in the order of the requests."""
        events: list[list[Event]] = [[] for _ in requests]
        for event in self.generate(requests, speculate=speculate):
            events[event.request].append(event)
        return [_completion(own) for own in events]

    def _submit(self, request: Request, speculate: Speculate, sink: deque[Event] | None) -> int:
        self.check(request)
        params, ids = request.params, list(request.prompt_ids)
        room = min(self.context, self.pages.total * self.pages.page_size) - len(ids)
        max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        end_id = self.model.config.eos_token_id if self._tokenizer is None else self._tokenizer.eos_id
        ends = params.stop_ids if params.ignore_eos else (end_id, *params.stop_ids)
        # The log-probability of a token needs the hidden state of the one before it.
        reuse = self.context if params.prompt_logprobs is None else max(0, params.prompt_logprobs_from - 1)
        depth = self.model.config.num_nextn_predict_layers if speculate == "auto" else speculate
        if params.depends_on_answer or max_tokens < 3:  # no draft before the first token, nor for the last
            depth = 0
        run = Run(
            Job(self._next_id, ids, self._clock() if sink is None else math.inf, reuse, drafts_for=depth > 0),
            request,
            Answer(self._spellings[params.skip_special], ends, params.stop, max_tokens),
            seed=random.getrandbits(64) if params.seed is None else params.seed,
            depth=depth,
            adaptive=speculate == "auto" and depth > 0,
            sink=sink,
        )
        self._scheduler.add(run.job, bounded=sink is None)
        self._runs[run.job.id] = run
        self._next_id += 1
        return run.job.id

    def check(self, request: Request) -> None:
        """Raises UserError for what can never be answered."""
        _check_ids(request, self.context, self.model.config.vocab_size)
        if request.params.stop and self._tokenizer is None:
            raise UserError("stop strings need a tokenizer: give stop_ids")
        most = request.params.max_tokens
        longest = len(request.prompt_ids) + (1 if most is None else most)
        check_fits(min(longest, self.context), self.pages)

    def _depth_of(self, speculate: Speculate) -> Speculate:
        layers = self.model.config.num_nextn_predict_layers
        if speculate != "auto" and not 0 <= speculate <= layers:
            raise UserError(
                f"asked to draft {speculate} tokens ahead, but the model has {layers} MTP layers: take 0 (off) to "
                f"{layers}"
            )
        return speculate

    def _expire(self, job: Job) -> tuple[Run, Event]:
        run = self._runs[job.id]
        self.abort(job.id)  # at once, or this step might admit it
        return run, Event(job.id, "", (), 0, "timeout")


class Generation:
    """A batch on its way: an iterator of events that can be abandoned at any time."""

    def __init__(self, engine: Engine, requests: Sequence[Request], speculate: Speculate):
        for request in requests:
            engine.check(request)
        self._engine, self._requests = engine, requests
        self._speculate: Speculate = speculate
        depth = engine.model.config.num_nextn_predict_layers if speculate == "auto" else speculate
        self.stats = Stats(sum(len(r.prompt_ids) for r in requests), drafted=[0] * depth, accepted=[0] * depth)

    def __iter__(self) -> Iterator[Event]:
        engine, stats = self._engine, self.stats
        events: deque[Event] = deque()
        started = time.perf_counter()
        index = {engine._submit(r, self._speculate, events): i for i, r in enumerate(self._requests)}
        spoken: set[int] = set()
        try:
            while index:
                engine._unclaimed = engine.step()
                stats.seconds += time.perf_counter() - started
                while events:
                    event = events.popleft()
                    stats.tokens += len(event.token_ids)
                    if event.request in spoken:
                        stats.count(event.accepted, event.drafted)
                    else:
                        stats.cached_tokens += event.cached_tokens
                    spoken.add(event.request)
                    number = index[event.request] if event.finish_reason is None else index.pop(event.request)
                    yield event._replace(request=number)
                started = time.perf_counter()
        finally:
            for id in index:
                engine.abort(id)


def _completion(events: Sequence[Event]) -> Completion:
    """One request's events, added up."""
    reason = events[-1].finish_reason
    assert reason is not None
    logprobs = [logprob for event in events if event.logprobs is not None for logprob in event.logprobs]
    return Completion(
        "".join(event.text for event in events),
        tuple(id for event in events for id in event.token_ids),
        reason,
        events[0].cached_tokens,
        tuple(logprobs) if events[0].logprobs is not None else None,
        next((event.prompt_logprobs for event in events if event.prompt_logprobs is not None), None),
    )


def _check_ids(request: Request, context: int, vocab_size: int) -> None:
    ids, bias = request.prompt_ids, request.params.logit_bias
    if not ids:
        raise UserError("the prompt is empty: give at least one token, such as the beginning-of-text token")
    if len(ids) + (request.params.max_tokens != 0) > context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but the model's context holds {context}, answer included: "
            "shorten the prompt"
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f"the prompt has token ids from {min(ids)} to {max(ids)}, outside the model's vocabulary of {vocab_size}: "
            "encode it with the model's own tokenizer"
        )
    if bias and not 0 <= min(bias) <= max(bias) < vocab_size:
        raise UserError(f"logit_bias names token {max(bias)}, outside the model's vocabulary of {vocab_size}")
