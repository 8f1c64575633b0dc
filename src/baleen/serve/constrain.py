"""Constrained decoding by llguidance: which tokens keep an answer within a JSON schema or the form of a tool call."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from baleen.data.tokenizer import Tokenizer
from baleen.infer.parse import END_THINK, ToolMarkers
from baleen.serve.errors import BadRequest
from baleen.serve.protocol import ChatRequest, ChosenTool, JsonObjectFormat, JsonSchemaFormat, Tool

ANY_OBJECT = {"type": "object"}
# White space between the parts of a JSON text, bounded: a small model could go on with it for ever.
WHITE_SPACE = r"( |\n {0,32})?"


class GrammarConstraint:
    """What may follow, for one answer that only grows, as the engine asks for it."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str):
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        self._eos = list(tokenizer.eos_tokens)
        self._size = tokenizer.vocab_size
        self._consumed = 0

    @property
    def error(self) -> str:
        """Why the matcher gave up (a grammar too complex for its limits), or an empty string."""
        return self._matcher.get_error()

    def allowed(self, answer_ids: Sequence[int]) -> Tensor | None:
        """Bool [vocab_size]: the tokens that may follow. None: anything, for the grammar is broken already."""
        self._consumed += self._matcher.try_consume_tokens(list(answer_ids[self._consumed :]))
        if self._consumed < len(answer_ids) and not self._matcher.is_stopped():
            return None
        if self._matcher.is_stopped():
            mask_Z = torch.zeros(self._size, dtype=torch.bool)
            mask_Z[self._eos] = True
            return mask_Z
        return torch.from_numpy(np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0)


class Constrainer:
    """Makes constraints for one model's tokens; safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._markers = ToolMarkers.of(tokenizer)
        self._lock = threading.Lock()
        self._tokens: llguidance.LLTokenizer | None = None

    def of(self, request: ChatRequest, thinking: bool) -> list[GrammarConstraint] | None:
        """One for each of the n answers, or None where the request asks for none. `thinking`: the prompt opened it.

        Raises BadRequest for a schema, or a choice of tools, that can't be held to.
        """
        grammar = self.grammar(request, thinking)
        if grammar is None:
            return None
        tokens = self._own_tokens()
        fault, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokens)
        if fault:
            param = "response_format" if request.response_format else "tools"
            raise BadRequest(f"{param} can't be held to: {_reason(messages[0])}", param=param, code="invalid_schema")
        return [GrammarConstraint(tokens, grammar) for _ in range(request.n or 1)]

    def grammar(self, request: ChatRequest, thinking: bool) -> str | None:
        """In llguidance's Lark: reasoning first where it is open, then JSON or calls."""
        form = request.response_format
        offered = request.offered
        body, rules = [], []
        if request.tool_choice == "required" or isinstance(request.tool_choice, ChosenTool):
            body.append("calls")
        elif isinstance(form, JsonObjectFormat | JsonSchemaFormat):
            body.append(_json(form.json_schema.schema_ if isinstance(form, JsonSchemaFormat) else ANY_OBJECT))
            body += ["calls"] * bool(offered)
        else:
            return None
        if "calls" in body:
            rules += self._calls(request, offered)
        before = ""
        if thinking:
            before = f"THOUGHT {self._token(END_THINK)} WHITE "
            rules += ["THOUGHT: /(.|\\n)*/", "WHITE: /\\n{0,2}/"]
        return "\n".join([f"start: {before}({' | '.join(body)})", *rules]) + "\n"

    def _calls(self, request: ChatRequest, tools: Sequence[Tool]) -> list[str]:
        names = self._markers
        assert names is not None, "tools are offered only to a model that has tokens for calls"
        if isinstance(request.tool_choice, ChosenTool):
            tools = [tool for tool in tools if tool.function.name == request.tool_choice.function.name]
        one_only = request.parallel_tool_calls is False or isinstance(request.tool_choice, ChosenTool)
        rules = [
            f"calls: {self._token(names.calls_begin)} call{'' if one_only else '+'} {self._token(names.calls_end)}",
            f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
        ]
        for i, tool in enumerate(tools):
            arguments = _json(tool.function.parameters or ANY_OBJECT)
            begin, separator, end = map(self._token, (names.begin, names.separator, names.end))
            rules.append(f'call_{i}: {begin} "{tool.function.name}" {separator} {arguments} {end}')
        return rules

    def _token(self, name: str) -> str:
        id = self._tokenizer.id_of(name)
        if id is None:
            raise BadRequest(
                f"this model has no token {name}, so its reasoning can't be bounded: set reasoning_effort to none",
                param="reasoning_effort",
                code="no_constraints",
            )
        return f"<[{id}]>"

    def _own_tokens(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokens is None:
                try:
                    self._tokens = llguidance.LLTokenizer(
                        self._tokenizer.definition, n_vocab=self._vocab_size, eos_token=self._tokenizer.eos_id
                    )
                except ValueError as error:  # of a kind that the library doesn't know
                    raise BadRequest(
                        f"this model's tokenizer can't be constrained ({error}): leave response_format out",
                        code="no_constraints",
                    ) from None
            return self._tokens


def _json(schema: dict[str, Any]) -> str:
    """A grammar's reference to a schema; what is dumped as JSON can't break out of it."""
    try:
        return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}, allow_nan=False)
    except (ValueError, RecursionError):
        raise BadRequest("a schema holds NaN or is nested too deeply", code="invalid_schema") from None


def _reason(message: str) -> str:
    """The library's first line, without its place in a grammar that the client never saw."""
    line = message.splitlines()[0]
    return line.partition("): ")[2] or line
