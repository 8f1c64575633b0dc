"""Control tokens, and how text that somebody typed is kept from becoming one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

REASONING_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")


class ControlTokens:
    """The added tokens that steer a model: those marked special, and any other written `<...>`.

    (DeepSeek's own `<｜User｜>` and `<｜Assistant｜>` are not marked special.) A message may hold none of them, but for
    the reasoning tokens in a message of the assistant.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def forged_in(self, message: Mapping[str, Any]) -> bool:
        """Whether any string of the message spells a control token that its author may not write."""
        allowed = _allowed(message)
        return any(m[0] not in allowed for text in _strings(message) for m in self._pattern.finditer(text))

    def spoil(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """The messages with a guard character inside each forged token, and that character, which occurs nowhere else.

        A template then renders them as it would, and only its own control tokens are whole in the result.
        """
        written = "".join(text for message in messages for text in _strings(message))
        guard = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in written)

        def spoilt(message: Mapping[str, Any]) -> dict[str, Any]:
            allowed = _allowed(message)

            def guarded(match: re.Match[str]) -> str:
                return match[0] if match[0] in allowed else match[0][0] + guard + match[0][1:]

            return _mapped(message, lambda text: self._pattern.sub(guarded, text))

        return [spoilt(message) for message in messages], guard

    def cut(self, text: str) -> Iterator[str | int]:
        """The text in pieces: a string of ordinary text, or the id of a control token."""
        position = 0
        for match in self._pattern.finditer(text):
            yield text[position : match.start()]
            yield self.ids[match[0]]
            position = match.end()
        yield text[position:]


def _allowed(message: Mapping[str, Any]) -> tuple[str, ...]:
    return REASONING_TOKENS if message["role"] == "assistant" else ()


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):  # its keys too: a tool's parameters are named by whoever asks
        return [text for item in value.items() for text in _strings(item)]
    parts = value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _strings(part)]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change` made to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list | tuple) else value
