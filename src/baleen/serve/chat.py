"""POST /v1/chat/completions: a conversation in, the assistant's next message out, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from baleen.infer.engine import Request
from baleen.infer.parse import END_THINK, THINK, AnswerParser, Call, Piece, Words, opens_reasoning
from baleen.infer.recent import recent
from baleen.infer.sampler import Constraint, SamplingParams
from baleen.infer.thinking import ThinkingBudget
from baleen.serve.answers import (
    AnswerMessage,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    FinishReason,
)
from baleen.serve.constrain import GrammarConstraint
from baleen.serve.errors import BadRequest
from baleen.serve.logprobs import chat_logprobs
from baleen.serve.models import Served
from baleen.serve.prompt import chat_prompt
from baleen.serve.protocol import ChatRequest, FunctionCall, Message, ToolCall
from baleen.serve.service import ChoicePart, Service, of_choice, sampling_params
from baleen.serve.tally import Tally, join_traces, trace_of, usage_of
from baleen.serve.worker import Arrival


@dataclass(kw_only=True)
class Part(ChoicePart):
    """What one arrival brings a choice."""

    deltas: list[Delta]
    logprobs: ChatLogprobs | None


class Choice:
    """One of the n answers, on its way."""

    def __init__(self, request: ChatRequest, model: Served, prompt_ids: Sequence[int], params: SamplingParams):
        self._request, self._model, self._params = request, model, params
        tokenizer = model.tokenizer
        thinking = opens_reasoning(tokenizer, prompt_ids)
        names = [tool.function.name for tool in request.offered]
        self._parser = AnswerParser(thinking=thinking, markers=model.markers if names else None, tools=names)
        self._part = self._parser.part
        self._borders = {tokenizer.id_of(THINK): "reasoning", tokenizer.id_of(END_THINK): "content"}
        self._end_ids = {tokenizer.eos_id, *params.stop_ids}
        self._calls = 0
        self.tally = Tally(len(prompt_ids))

    def take(self, arrival: Arrival) -> Part:
        event = arrival.event
        self.tally.take(arrival)
        pieces = self._parser.feed(event.text)
        reason: FinishReason | None = None
        if event.finish_reason is not None:
            pieces += self._parser.flush()
            reason = "length" if event.finish_reason == "length" else "stop"
        parts = self._parts(event.token_ids)
        self.tally.reasoning_tokens += parts.count("reasoning")
        deltas = [self._delta(piece) for piece in pieces]
        constraint = self._params.constraint
        if reason is not None and isinstance(constraint, GrammarConstraint) and constraint.error:
            raise BadRequest(f"the answer could not be held to its schema: {constraint.error}", code="invalid_schema")
        if reason == "stop" and self._calls:
            reason = "tool_calls"
        trace = trace_of(arrival, self._model.tokenizer, parts) if self._params.trace else None
        return Part(deltas=deltas, logprobs=self._logprobs(arrival), trace=trace, finish_reason=reason)

    def _parts(self, ids: Sequence[int]) -> list[str]:
        """Reasoning or content, for each token; where the tokenizer has no `<think>`, the text's word for all."""
        if None in self._borders:
            self._part = self._parser.part
            return [self._part] * len(ids)
        parts = []
        for id in ids:
            opens = self._borders.get(id) == "reasoning"
            parts.append("reasoning" if opens else self._part)
            self._part = self._borders.get(id, self._part)
        return parts

    def _delta(self, piece: Piece) -> Delta:
        if isinstance(piece, Words):
            if piece.part == "reasoning":
                return Delta(reasoning_content=piece.text)
            return Delta(content=piece.text)
        assert isinstance(piece, Call)
        function = FunctionCall(name=piece.name, arguments=piece.arguments)
        call = CallDelta(index=self._calls, id=f"call_{uuid.uuid4().hex}", type="function", function=function)
        self._calls += 1
        return Delta(tool_calls=[call])

    def _logprobs(self, arrival: Arrival) -> ChatLogprobs | None:
        entries = arrival.event.logprobs
        if entries is None:
            return None
        if arrival.event.finish_reason == "stop" and entries and entries[-1].token_id in self._end_ids:
            entries = entries[:-1]  # the end token is no part of the content
        return ChatLogprobs(
            content=chat_logprobs(self._model.tokenizer, entries, self._request.top_logprobs or 0), refusal=None
        )


class Chat:
    """One request, prepared: its prompt read, its schema compiled, its answers not begun. Raises ApiError."""

    def __init__(self, service: Service, request: ChatRequest):
        self._service, self._request = service, request
        self._model = service.models.get(request.model)
        if request.offered and self._model.markers is None:
            message = "this model has no tokens for tool calls: leave tools out, or set tool_choice to none"
            raise BadRequest(message, param="tools", code="no_tools")
        count = request.n or 1
        service.check_choices(count)
        self._prompt_ids, self._dropped = self._read()
        self._model.check_prompt(self._prompt_ids, "messages", service.limits)
        params = self._params()
        thinking = opens_reasoning(self._model.tokenizer, self._prompt_ids)
        constraints = self._constraints(thinking) or [None] * count
        each = [of_choice(params, place, constraint) for place, constraint in enumerate(constraints)]
        self._requests = [Request(self._prompt_ids, one) for one in each]
        self._choices = [Choice(request, self._model, self._prompt_ids, one) for one in each]
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def _constraints(self, thinking: bool) -> Sequence[Constraint] | None:
        """One for each choice; thinking: the prompt has opened a thought."""
        constraints = self._model.constrainer.of(self._request, thinking)
        budget = self._request.baleen.thinking_budget
        if budget is None:
            return constraints
        if constraints is not None:
            raise BadRequest(
                "a thinking budget and an answer held to a form can't be had together: leave one out", param="baleen"
            )
        vocab_size = self._model.engine.model.config.vocab_size
        return [ThinkingBudget(self._model.tokenizer, vocab_size, budget, opened=thinking)] * (self._request.n or 1)

    def _read(self) -> tuple[list[int], int]:
        """The prompt's tokens, and how many of the oldest messages, asked to fit, it leaves out."""
        request, context = self._request, self._model.engine.context

        def encode(messages: list[Message]) -> list[int]:
            kept = request.model_copy(update={"messages": messages})
            return chat_prompt(self._model.tokenizer, kept, self._model.system)

        if not request.baleen.fit:
            return encode(request.messages), 0
        return recent(request.messages, encode, min(self._service.limits.prompt_tokens or context, context * 3 // 4))

    def _params(self) -> SamplingParams:
        defaults, markers = self._model.chat_params, self._model.markers
        stop_ids = [*defaults.stop_ids, *self._model.tokenizer.answer_ends]
        if self._request.parallel_tool_calls is False and markers is not None and self._request.offered:
            end_id = self._model.tokenizer.id_of(markers.end)
            stop_ids += [] if end_id is None else [end_id]
        return sampling_params(
            self._request,
            self._model,
            defaults,
            max_tokens=self._request.length,
            stop_ids=tuple(stop_ids),
            logprobs=self._request.top_logprobs or 0 if self._request.logprobs else None,
            skip_special=not self._request.offered,
        )

    async def answer(self) -> ChatCompletion:
        parts: list[list[Part]] = [[] for _ in self._choices]
        async with aclosing(self._service.parts(self._model, self._requests, self._choices, streams=False)) as arriving:
            async for index, part in arriving:
                parts[index].append(part)
        traces = [self._whole_trace(p) for p in parts] if self._request.baleen.trace else [self._dropping()]
        extension = traces[0] if len(traces) == 1 else traces
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model.name,
            choices=[joined(index, part) for index, part in enumerate(parts)],
            usage=usage_of([choice.tally for choice in self._choices], 1),
            **({"baleen": extension} if extension else {}),
        )

    def _whole_trace(self, parts: Sequence[Part]) -> dict[str, Any]:
        traces = [part.trace for part in parts if part.trace is not None]
        return {**join_traces(traces), "stats": traces[-1]["stats"], **self._dropping()}

    def _dropping(self) -> dict[str, int]:
        return {"dropped_messages": self._dropped} if self._dropped else {}

    async def chunks(self) -> AsyncIterator[ChatChunk]:
        begun: set[int] = set()
        options = self._request.stream_options
        with_usage = options is not None and options.include_usage
        async with aclosing(self._service.parts(self._model, self._requests, self._choices, streams=True)) as arriving:
            async for index, part in arriving:
                for choice, extension in self._chunks_of(index, part, index not in begun):
                    chunk = self._chunk([choice])
                    if with_usage:
                        chunk.usage = None  # set, so that it is sent: the last chunk has it
                    if extension:
                        chunk.baleen = extension
                    yield chunk
                begun.add(index)
        if with_usage:
            chunk = self._chunk([])
            chunk.usage = usage_of([choice.tally for choice in self._choices], 1)
            yield chunk

    def _chunks_of(self, index: int, part: Part, first: bool) -> Iterator[tuple[ChatChunkChoice, dict[str, Any]]]:
        """One for each delta, with what it has of the extension; the end comes alone and last.

        What goes with the tokens rides on the last chunk of an arrival.
        """
        deltas = [*([Delta(role="assistant", content="")] if first else []), *part.deltas]
        trace = part.trace or {}
        if part.finish_reason is not None or (not deltas and (part.logprobs or trace)):
            deltas.append(Delta())
        for place, delta in enumerate(deltas):
            last = place == len(deltas) - 1
            choice = ChatChunkChoice(
                index=index,
                delta=delta,
                logprobs=part.logprobs if last else None,
                finish_reason=part.finish_reason if last else None,
            )
            yield choice, {**(trace if last else {}), **(self._dropping() if first and place == 0 else {})}

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model.name,
            choices=choices,
        )


def joined(index: int, parts: Sequence[Part]) -> ChatChoice:
    """The chunks of one choice as one message: what a client would make of the stream."""
    deltas = [delta for part in parts for delta in part.deltas]
    content = "".join(delta.content or "" for delta in deltas)
    reasoning = "".join(delta.reasoning_content or "" for delta in deltas)
    calls = [
        ToolCall(id=call.id, type="function", function=call.function)
        for delta in deltas
        for call in delta.tool_calls or ()
    ]
    entries = [entry for part in parts if part.logprobs is not None for entry in part.logprobs.content]
    with_logprobs = any(part.logprobs is not None for part in parts)
    finish_reason = parts[-1].finish_reason
    assert finish_reason is not None
    message = AnswerMessage(role="assistant", content=None if calls and not content else content)
    if reasoning:
        message.reasoning_content = reasoning
    if calls:
        message.tool_calls = calls
    return ChatChoice(
        index=index,
        message=message,
        logprobs=ChatLogprobs(content=entries, refusal=None) if with_logprobs else None,
        finish_reason=finish_reason,
    )
