"""POST /v1/completions: text or token ids in, their continuation out; with `echo` and logprobs a prompt's score."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from baleen.infer.engine import Request
from baleen.infer.sampler import SamplingParams
from baleen.serve.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from baleen.serve.logprobs import TextLogprobs
from baleen.serve.models import Served
from baleen.serve.prompt import beginning, completion_prompts
from baleen.serve.protocol import CompletionRequest
from baleen.serve.service import ChoicePart, Service, of_choice, sampling_params
from baleen.serve.tally import Tally, join_traces, trace_of, usage_of
from baleen.serve.worker import Arrival


@dataclass(kw_only=True)
class Part(ChoicePart):
    """What one arrival brings a choice."""

    text: str
    logprobs: CompletionLogprobs | None


class Choice:
    """One continuation, on its way. `text`: the prompt's, as it is to be echoed."""

    def __init__(self, request: CompletionRequest, model: Served, prompt_ids: Sequence[int], text: str, added: int):
        self._request, self._model = request, model
        self._echoed = (list(prompt_ids[added:]), added, text) if request.echo else None
        offset = 0 if request.echo else len(text)
        wanted = request.logprobs is not None
        self._logprobs = TextLogprobs(model.tokenizer, request.logprobs or 0, offset) if wanted else None
        self.tally = Tally(len(prompt_ids))

    def take(self, arrival: Arrival) -> Part:
        event = arrival.event
        self.tally.take(arrival)
        text, ids, entries = event.text, list(event.token_ids), list(event.logprobs or ())
        if self._echoed is not None:
            prompt_ids, added, prompt = self._echoed
            self._echoed = None
            text = prompt + text
            if event.prompt_logprobs is not None:  # of all but the first token, which nothing predicts
                ids = prompt_ids + ids
                entries = [*([] if added else [None]), *event.prompt_logprobs, *entries]
        logprobs = None if self._logprobs is None else self._logprobs.take(ids, entries)
        parts = ["content"] * len(event.token_ids)
        trace = trace_of(arrival, self._model.tokenizer, parts) if self._request.baleen.trace else None
        reason = None if event.finish_reason is None else "length" if event.finish_reason == "length" else "stop"
        return Part(text=text, logprobs=logprobs, trace=trace, finish_reason=reason)


class Completions:
    """One request, prepared. Raises ApiError."""

    def __init__(self, service: Service, request: CompletionRequest):
        self._service, self._request = service, request
        self._model = service.models.get(request.model)
        tokenizer = self._model.tokenizer
        prompts = completion_prompts(tokenizer, request)
        self._prompts, n = len(prompts), request.n or 1
        service.check_choices(self._prompts * n)
        for ids in prompts:
            self._model.check_prompt(ids, "prompt", service.limits)
        params = sampling_params(
            request,
            self._model,
            SamplingParams(stop_ids=self._model.chat_params.stop_ids),
            max_tokens=request.max_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs or 0
            if request.max_tokens == 0
            else request.logprobs
            if request.echo
            else None,
        )
        texts = self._texts(prompts)
        added = len(beginning(tokenizer)) if isinstance(self._first, str) else 0
        self._requests = [Request(ids, of_choice(params, place)) for ids in prompts for place in range(n)]
        self._choices = [
            Choice(request, self._model, ids, text, added)
            for ids, text in zip(prompts, texts, strict=True)
            for _ in range(n)
        ]
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    @property
    def _first(self) -> object:
        """What says of which kind the prompt is."""
        return self._request.prompt if isinstance(self._request.prompt, str) else self._request.prompt[0]

    def _texts(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        prompt = self._request.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(self._first, str):
            return [str(text) for text in prompt]
        return [self._model.tokenizer.decode(ids, skip_special=False) for ids in prompts]

    async def answer(self) -> Completion:
        parts: list[list[Part]] = [[] for _ in self._choices]
        async with aclosing(self._service.parts(self._model, self._requests, self._choices, streams=False)) as arriving:
            async for index, part in arriving:
                parts[index].append(part)
        answer = self._body([joined(index, part) for index, part in enumerate(parts)])
        answer.usage = self._usage
        if self._request.baleen.trace:
            traces = [[part.trace for part in choice if part.trace is not None] for choice in parts]
            whole = [{**join_traces(trace), "stats": trace[-1]["stats"]} for trace in traces]
            answer.baleen = whole[0] if len(whole) == 1 else whole
        return answer

    async def chunks(self) -> AsyncIterator[Completion]:
        options = self._request.stream_options
        with_usage = options is not None and options.include_usage
        async with aclosing(self._service.parts(self._model, self._requests, self._choices, streams=True)) as arriving:
            async for index, part in arriving:
                if part.text or part.logprobs or part.trace or part.finish_reason:
                    yield self._chunk(index, part, with_usage)
        if with_usage:
            chunk = self._body([])
            chunk.usage = self._usage
            yield chunk

    def _chunk(self, index: int, part: Part, with_usage: bool) -> Completion:
        choice = CompletionChoice(index=index, text=part.text, logprobs=part.logprobs, finish_reason=part.finish_reason)
        chunk = self._body([choice])
        if with_usage:
            chunk.usage = None  # set, so that it is sent: the last chunk has it
        if part.trace is not None:
            chunk.baleen = part.trace
        return chunk

    @property
    def _usage(self) -> Usage:
        return usage_of([choice.tally for choice in self._choices], self._prompts)

    def _body(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id, object="text_completion", created=self._created, model=self._model.name, choices=choices
        )


def joined(index: int, parts: Sequence[Part]) -> CompletionChoice:
    """The chunks of one choice as one."""
    shapes = [part.logprobs for part in parts if part.logprobs is not None]
    logprobs = None
    if shapes:
        logprobs = CompletionLogprobs(
            **{name: [x for shape in shapes for x in getattr(shape, name)] for name in CompletionLogprobs.model_fields}
        )
    return CompletionChoice(
        index=index,
        text="".join(part.text for part in parts),
        logprobs=logprobs,
        finish_reason=parts[-1].finish_reason,
    )
