"""Requests to answers, many at once: continuous batching over one paged latent cache.

docs/life-of-a-request.md tells the life of a request; who runs when is the scheduler's business, what is drawn the
sampler's, what is drafted the drafter's. Nothing here depends on what else is in the batch.

Shapes: N tokens of a step, R places that want a token, d hidden, Z = vocab_size.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.data.tokenizer import Tokenizer
from baleen.infer.logprobs import logprobs_of
from baleen.infer.pages import PagePool
from baleen.infer.request import Completion, Event, Logprob, Request, Stats
from baleen.infer.run import Run
from baleen.infer.runner import Runner, TorchRunner
from baleen.infer.sampler import choose
from baleen.infer.scheduler import Busy, Job, Scheduler, check_fits
from baleen.infer.speculative import Drafter, Payoff
from baleen.infer.text import Answer
from baleen.model.cache import Batch, LatentPages
from baleen.model.transformer import Transformer

__all__ = ["Busy", "Completion", "Engine", "Event", "Generation", "Logprob", "Request", "Stats"]

PAGE_SIZE = 16  # tokens
MAX_CACHE_BYTES = 2**30  # unless cache_tokens says otherwise; memory is taken only as it is used

Speculate = int | Literal["auto"]


class Engine:
    """A model and its tokenizer, ready to answer. Not to be used from two threads at once.

    tokenizer: None to work with token ids alone; answers then end at the model's own end token.

    cache_tokens: tokens of all requests that the cache holds; None: `max_batch` full contexts, but no more than a
    GiB. max_batch: answers under way at once. prefill_chunk: tokens of prompts that a step reads. max_queue,
    queue_seconds: bounds of the queue, None for none. speculate: drafts a step for submitted requests; "auto": as deep
    as the model was trained for, and only while it pays. clock: seconds.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        cache_tokens: int | None = None,
        max_batch: int = 256,
        prefill_chunk: int = 512,
        max_queue: int | None = None,
        queue_seconds: float | None = None,
        speculate: Speculate = 0,
        page_size: int = PAGE_SIZE,
        runner: Callable[[Transformer, LatentPages], Runner] = TorchRunner,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self._tokenizer = model, tokenizer
        config = model.config
        self._speculate: Speculate = self._depth_of(speculate)
        with torch.inference_mode():
            like = {"dtype": model.model.norm.weight.dtype, "device": model.device}
            one = LatentPages(config, 1, page_size=page_size, mtp=True, **like)
            if cache_tokens is None:
                affordable = MAX_CACHE_BYTES // one.bytes_per_token
                cache_tokens = max(self.context, min(max_batch * self.context, affordable))
            count = -(-cache_tokens // page_size)
            self._runner = runner(model, LatentPages(config, count, page_size=page_size, mtp=True, **like))
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
        self._drafter = Drafter(self._runner, depth) if depth else None
        self._payoff = Payoff()
        self._clock = clock
        self._runs: dict[int, Run] = {}
        self._next_id = 0

    # --- what there is

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "this engine works with token ids alone"
        return self._tokenizer

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that a sequence may have."""
        return self.model.config.max_position_embeddings

    @property
    def latents(self) -> LatentPages:
        return self._runner.pages

    @property
    def has_work(self) -> bool:
        return bool(self._runs)

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
            events += self._move_on(plan)
        mine = []
        for run, event in events:
            if event.finish_reason is not None:
                del self._runs[run.job.id]
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

    # --- one step

    def _move_on(self, plan: Sequence[tuple[Run, int]]) -> list[tuple[Run, Event]]:
        started = self._clock()
        runs, tokens = [run for run, _ in plan], []
        for run, count in plan:
            tokens += run.read(len(tokens), count)
        starts, tables = [run.job.computed for run in runs], [run.job.pages for run in runs]
        result = self._runner.forward(Batch(tokens, starts, [count for _, count in plan], tables))
        self._score_prompts(runs, result.hidden_Nd)
        speakers = [run for run in runs if run.span.is_last]
        only_answers = all(run.job.remaining == 1 for run in runs)
        said = [run.answer.count for run in speakers]
        events = [
            (run, run.move_on(drawn, logprobs, result.experts))
            for run, (drawn, logprobs) in zip(speakers, self._draw(speakers, result.hidden_Nd), strict=True)
        ]
        finished = {run.job.id for run, event in events if event.finish_reason is not None}
        drafting = self._draft([run for run in runs if run.job.id not in finished], result.hidden_Nd)
        for run in runs:
            self._scheduler.advance(run.job, run.job.computed + run.span.count)
            if run.job.id in finished:
                self._scheduler.remove(run.job)
        if only_answers and any(run.adaptive for run in runs):
            brought = sum(run.answer.count for run in speakers) - sum(said)
            self._payoff.observe(len(runs), drafting, brought, self._clock() - started)
        return events

    def _score_prompts(self, runs: Sequence[Run], hidden_Nd: Tensor) -> None:
        for run in runs:
            rows, ids = run.scored_rows()
            if ids:
                logits_MZ = self._runner.logits(hidden_Nd[rows.start : rows.stop])
                tops = [run.request.params.prompt_logprobs or 0] * len(ids)
                run.prompt_logprobs += logprobs_of(logits_MZ, ids, tops)

    def _draw(self, runs: Sequence[Run], hidden_Nd: Tensor) -> list[tuple[list[int], list[Logprob] | None]]:
        """For each run the tokens at its places, and what it wants to know of them."""
        places = [run.places() for run in runs]
        rows = [row for run, own in zip(runs, places, strict=True) if own for row in run.place_rows()]
        if not rows:
            return [([], None) for _ in runs]
        logits_RZ = self._runner.logits(hidden_Nd if rows == list(range(len(hidden_Nd))) else hidden_Nd[rows])
        drawn = choose(logits_RZ, [place for own in places for place in own]).tolist()
        wanted = [place.params.logprobs for own in places for place in own]
        asked = [r for r, top in enumerate(wanted) if top is not None]
        found = logprobs_of(logits_RZ[asked], [drawn[r] for r in asked], [wanted[r] or 0 for r in asked])
        logprobs = dict(zip(asked, found, strict=True))
        out, first = [], 0
        for own in places:
            own_rows = range(first, first + len(own))
            first += len(own)
            known = [logprobs[r] for r in own_rows] if own and own[0].params.logprobs is not None else None
            out.append(([drawn[r] for r in own_rows], known))
        return out

    def _draft(self, runs: Sequence[Run], hidden_Nd: Tensor) -> bool:
        """Let the MTP layers read along, and draft for the next step; whether adaptive answers under way did."""
        rows = sum(run.span.is_last for run in runs)
        pays = any(run.adaptive for run in runs) and rows > 0 and self._payoff.drafts(rows)
        windows = []
        for run in runs:
            # Prompts are always read along: later drafts, when they pay again, rest on them.
            if run.depth and (pays or not run.adaptive or run.job.remaining > 1 or run.answer.count <= 1):
                windows.append((run, run.window()))
            run.tail_Td = None
        if windows:
            assert self._drafter is not None
            self._drafter.propose(hidden_Nd, [window for _, window in windows])
        for run, window in windows:
            run.job.drafts, run.tail_Td = window.drafts, window.tail_Td
        return pays

    # --- requests

    def _submit(self, request: Request, speculate: Speculate, sink: deque[Event] | None) -> int:
        self.check(request)
        params, ids = request.params, list(request.prompt_ids)
        room = self.context - len(ids)
        max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        end_id = self.model.config.eos_token_id if self._tokenizer is None else self._tokenizer.eos_id
        ends = params.stop_ids if params.ignore_eos else (end_id, *params.stop_ids)
        # The log-probability of a token needs the hidden state of the one before it.
        reuse = len(ids) if params.prompt_logprobs is None else max(0, params.prompt_logprobs_from - 1)
        depth = self.model.config.num_nextn_predict_layers if speculate == "auto" else speculate
        run = Run(
            Job(self._next_id, ids, self._clock(), reuse),
            request,
            Answer(self._tokenizer, ends, params.stop, max_tokens, params.skip_special),
            seed=random.getrandbits(64) if params.seed is None else params.seed,
            depth=0 if params.depends_on_answer else depth,
            adaptive=speculate == "auto",
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
        longest = len(request.prompt_ids) + (request.params.max_tokens or self.context)
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
        return self._runs[job.id], Event(job.id, "", (), 0, "timeout")


class Generation:
    """A batch on its way: an iterator of events that can be abandoned at any time."""

    def __init__(self, engine: Engine, requests: Sequence[Request], speculate: Speculate):
        for request in requests:
            engine.check(request)
        self._engine, self._requests, self._speculate = engine, requests, speculate
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
                engine.step()
                stats.seconds += time.perf_counter() - started
                stats.steps += any(event.request in spoken for event in events)
                while events:
                    event = events.popleft()
                    stats.tokens += len(event.token_ids)
                    if event.request in spoken:
                        stats.count(event.accepted, event.drafted)
                    else:
                        stats.cached_tokens += event.cached_tokens
                    spoken.add(event.request)
                    number = index[event.request] if event.finish_reason is None else index.pop(event.request)
                    yield replace(event, request=number)
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
