"""An answer's text, as it comes, into its parts: reasoning, content and calls of tools.

A marker cut in two by the stream is held back until it is known for one, and none is ever shown. `<answer>` is a marker
only in the form that R1's rewards ask for, right behind the thought; elsewhere it is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from baleen.data.tokenizer import Tokenizer
from baleen.infer.text import overlap

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
TAIL = 16  # tokens of a prompt in which a template opens the reasoning
# DeepSeek-V3 and R1 wrote a type before the separator and a code block after it; V3.1 and Baleen the bare parts.
FENCED = re.compile(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", re.DOTALL)


@dataclass(frozen=True)
class ToolMarkers:
    """The control tokens around calls, as the tokenizer spells them."""

    calls_begin: str
    begin: str
    separator: str
    end: str
    calls_end: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ToolMarkers | None:
        """None: the tokenizer has no such tokens, so its model was not taught to call tools this way."""
        for names in (BALEEN_MARKERS, DEEPSEEK_MARKERS):
            if all(tokenizer.id_of(name) is not None for name in names):
                return cls(*names)
        return None


BALEEN_MARKERS = (
    "<|tool_calls_begin|>", "<|tool_call_begin|>", "<|tool_sep|>", "<|tool_call_end|>", "<|tool_calls_end|>",
)  # fmt: skip
DEEPSEEK_MARKERS = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
)  # fmt: skip


@dataclass(frozen=True)
class Words:
    part: Literal["reasoning", "content"]
    text: str


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # a JSON object


Piece = Words | Call


def opens_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether the answer begins inside `<think>`, because the prompt ends there."""
    return tokenizer.decode(prompt_ids[-TAIL:], skip_special=False).rstrip().endswith(THINK)


class AnswerParser:
    """Feed it text, take pieces. `part` is where the next words belong.

    White space next to a marker, on its far side, is dropped, but for `</answer>`. A call that is malformed, or of a
    tool that was not offered, comes back as content, as it was written; so does one cut short.
    """

    def __init__(self, *, thinking: bool = False, markers: ToolMarkers | None = None, tools: Collection[str] = ()):
        self._markers, self._tools = markers, frozenset(tools)
        self._state: Literal["reasoning", "content", "call"] = "reasoning" if thinking else "content"
        self._held = ""
        self._fresh = True  # nothing shown since the last marker
        self._form = ""  # the marker that R1's form has next, if the answer is in it

    @property
    def part(self) -> Literal["reasoning", "content"]:
        return "reasoning" if self._state == "reasoning" else "content"

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while (found := self._first_marker()) is not None:
            at, marker = found
            before, self._held = self._held[:at], self._held[at + len(marker) :]
            pieces += self._leave(before, marker)
        if self._state != "call":
            keep = max((overlap(self._held, marker) for marker in self._awaited()), default=0)
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            pieces += self._words(shown)
        return pieces

    def flush(self) -> list[Piece]:
        """The end of the answer."""
        held, self._held = self._held, ""
        if self._state == "call":
            self._state = "content"
            return self._call(held, "")
        return self._words(held)

    def _awaited(self) -> list[str]:
        """The markers that mean something here."""
        if self._state == "reasoning":
            return [END_THINK]
        tools = self._markers
        if self._state == "call":
            assert tools is not None
            return [tools.end, tools.calls_end]
        form = [self._form] if self._form else []
        return [THINK, END_THINK, *form] + ([] if tools is None else [tools.calls_begin, tools.begin, tools.calls_end])

    def _first_marker(self) -> tuple[int, str] | None:
        if self._form == ANSWER and not ANSWER.startswith(self._held.lstrip()[: len(ANSWER)]):
            self._form = ""  # other words come first
        return min(((at, m) for m in self._awaited() if (at := self._held.find(m)) >= 0), default=None)

    def _leave(self, before: str, marker: str) -> list[Piece]:
        pieces = self._call(before, marker) if self._state == "call" else self._words(before)
        opens_call = self._markers is not None and marker == self._markers.begin
        self._state = "reasoning" if marker == THINK else "call" if opens_call else "content"
        self._form = {END_THINK: ANSWER, ANSWER: END_ANSWER}.get(marker, "")
        self._fresh = marker != END_ANSWER
        return pieces

    def _words(self, text: str) -> list[Piece]:
        if self._fresh:
            text = text.lstrip()
        if not text:
            return []
        self._fresh = False
        return [Words(self.part, text)]

    def _call(self, body: str, marker: str) -> list[Piece]:
        assert self._markers is not None
        name, separator, arguments = body.partition(self._markers.separator)
        if name.strip() == "function" and (fenced := FENCED.fullmatch(arguments)):
            name, arguments = fenced[1], fenced[2]
        name, arguments = name.strip(), arguments.strip()
        if separator and name in self._tools and is_object(arguments):
            return [Call(name, arguments)]
        end = marker if marker == self._markers.end else ""
        return [Words("content", self._markers.begin + body + end)]


def words_of(texts: Iterable[str]) -> Iterator[Words]:
    """Reasoning and content of an answer that calls no tools, as its text comes."""
    parser = AnswerParser()
    for text in texts:
        yield from (piece for piece in parser.feed(text) if isinstance(piece, Words))
    yield from (piece for piece in parser.flush() if isinstance(piece, Words))


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
