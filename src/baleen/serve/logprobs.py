"""Log probabilities in the protocol's two shapes: of chat, and of the older completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from baleen.data.tokenizer import Tokenizer
from baleen.infer.request import Logprob
from baleen.serve.answers import CompletionLogprobs, TokenLogprob, TopLogprob

LEAST = -9999.0  # JSON has no infinity; what a token of no probability gets


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[Logprob], top: int) -> list[TokenLogprob]:
    def shown(id: int, logprob: float) -> dict[str, object]:
        raw = tokenizer.token_bytes(id)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}

    return [
        TokenLogprob.model_validate(
            {
                **shown(entry.token_id, entry.logprob),
                "top_logprobs": [TopLogprob.model_validate(shown(*one)) for one in entry.top[:top]],
            }
        )
        for entry in entries
    ]


class TextLogprobs:
    """The old shape, for one answer: it counts the characters of the text. `offset`: those before the first token."""

    def __init__(self, tokenizer: Tokenizer, top: int, offset: int):
        self._tokenizer, self._top, self._offset = tokenizer, top, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def take(self, ids: Sequence[int], entries: Sequence[Logprob | None]) -> CompletionLogprobs:
        """`entries` go with `ids`; None for a prompt's first token."""
        offsets = []
        for id in ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(id)))
        return CompletionLogprobs(
            tokens=[token_text(self._tokenizer, id) for id in ids],
            token_logprobs=[None if entry is None else max(entry.logprob, LEAST) for entry in entries],
            top_logprobs=[None if entry is None else _best(self._tokenizer, entry, self._top) for entry in entries],
            text_offset=offsets,
        )


def _best(tokenizer: Tokenizer, entry: Logprob, top: int) -> dict[str, float]:
    """The `top` best and the chosen one, which need not be among them."""
    named = {token_text(tokenizer, id): max(logprob, LEAST) for id, logprob in entry.top[:top]}
    return {**named, token_text(tokenizer, entry.token_id): max(entry.logprob, LEAST)}


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token's text; where it is no whole characters, its bytes as OpenAI writes them: `bytes:\\xe2\\x82`."""
    raw = tokenizer.token_bytes(id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
