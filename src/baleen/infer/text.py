"""Tokens to text while they arrive: never half a character, never the beginning of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Literal

from baleen.data.tokenizer import Tokenizer


class Spelling(dict[int, bytes]):
    """What each token adds to a text, looked up once; special tokens add nothing unless asked for."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        super().__init__()
        self._tokenizer, self._skip_special = tokenizer, skip_special

    def __missing__(self, id: int) -> bytes:
        is_special = self._tokenizer.decode([id]) == "" != self._tokenizer.decode([id], skip_special=False)
        self[id] = b"" if is_special and self._skip_special else self._tokenizer.token_bytes(id)
        return self[id]


class Detokenizer:
    """Bytes of tokens -> text, a character as soon as it is whole.

    Bytes that can no longer become a character turn into U+FFFD, exactly as when all bytes are decoded at once.
    """

    def __init__(self, spelling: Spelling):
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return self._decoder.decode(b"".join([self._spelling[id] for id in ids]))

    def flush(self) -> str:
        """The end: what is still half a character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one.

    First is the one that is complete first, as if the text came one character at a time (of two that end together the
    longer): so the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """More text -> what may be shown now. After a stop string nothing more is let through."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The end: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` and is not the whole of it."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


class Answer:
    """The text side of one request: what its tokens say (nothing, without a spelling), and when it ends."""

    def __init__(
        self,
        spelling: Spelling | None,
        end_ids: Iterable[int],
        stops: Sequence[str],
        max_tokens: int,
    ):
        self.max_tokens, self.count = max_tokens, 0
        self._end_ids = frozenset(end_ids)
        self._detokenizer = None if spelling is None else Detokenizer(spelling)
        self._matcher = StopMatcher(stops)

    def feed(self, tokens: Sequence[int]) -> tuple[str, int, Literal["stop", "length"] | None]:
        """Take tokens up to the one that ends the answer: (text, how many were taken, why it ends here)."""
        text, used = "", 0
        reason: Literal["stop", "length"] | None = "length" if self.count == self.max_tokens else None
        while reason is None and used < len(tokens):
            token = tokens[used]
            used += 1
            if token in self._end_ids:
                reason = "stop"
            else:
                if self._detokenizer is not None:
                    text += self._matcher.feed(self._detokenizer.feed([token]))
                if self._matcher.stopped:
                    reason = "stop"
                elif self.count + used == self.max_tokens:
                    reason = "length"
        self.count += used
        if reason is not None and self._detokenizer is not None:
            text += self._matcher.feed(self._detokenizer.flush()) + self._matcher.flush()
        return text, used, reason
