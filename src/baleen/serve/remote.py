"""A server as a partner of the terminal's chat: `baleen chat --url URL`."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

from baleen.config import UserError
from baleen.data.document import Message
from baleen.infer.parse import END_THINK, THINK
from baleen.infer.request import Stats
from baleen.infer.sampler import SamplingParams

TIMEOUT = 600.0  # seconds without a byte
SENT = ("top_p", "top_k", "min_p", "max_tokens")  # where they are not 0, which is off: other servers may lack them


class Remote:
    """Any server that speaks the OpenAI API; one of ours also drops old turns and tells its speed.

    model: None for the first that it has. Raises UserError where it can't be reached or has no such model.
    """

    drafts = False  # the server decides

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None):
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        with self._open("/models") as response:
            try:
                cards = {card["id"]: card for card in json.load(response)["data"]}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self._base}/models answers with something else: is it an OpenAI API?") from None
            except (OSError, http.client.HTTPException) as error:
                raise _broken(error) from None
        if not cards or (model or next(iter(cards))) not in cards:
            raise UserError(f"{url} has no model {model}: take one of {', '.join(map(str, cards)) or 'none'}")
        self.model = model or next(iter(cards))
        self._is_ours = "baleen" in cards[self.model]

    def reply(self, messages: Sequence[Message], params: SamplingParams, draft: bool) -> RemoteReply:
        body: dict[str, Any] = {name: value for name in SENT if (value := getattr(params, name))}
        body |= {"temperature": params.temperature, "model": self.model, "stream": True}
        body |= {} if params.seed is None else {"seed": params.seed}
        body["messages"] = [{"role": message.role, "content": message.content} for message in messages]
        if self._is_ours:
            body["baleen"] = {"trace": True, "fit": True}
        return RemoteReply(self._open("/chat/completions", body))

    def _open(self, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._base + path, data, self._headers)
            return urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            raise UserError(_message(error)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{self._base} can't be reached ({error}): is `baleen serve` running there?") from None


class RemoteReply:
    """An answer as it streams in; given up, its connection closes, and the server stops writing."""

    def __init__(self, response: http.client.HTTPResponse):
        self._chunks = _chunks(response)
        self.stats = Stats()
        self._first = next(self._chunks, None)
        self.dropped = self._first.ours.get("dropped_messages", 0) if self._first else 0

    def __iter__(self) -> Iterator[str]:
        thinking = False
        try:
            chunk = self._first
            while chunk is not None:
                self._count(chunk.ours.get("stats"))
                if chunk.thought:
                    yield chunk.thought if thinking else f"{THINK}\n{chunk.thought}"
                    thinking = True
                if chunk.text:
                    yield f"{END_THINK}\n{chunk.text}" if thinking else chunk.text
                    thinking = False
                chunk = next(self._chunks, None)
        finally:
            self._chunks.close()

    def _count(self, stats: dict[str, Any] | None) -> None:
        if stats is not None:
            tokens, accepted = stats["completion_tokens"], stats["accepted"]
            self.stats = Stats(
                prompt_tokens=stats["prompt_tokens"],
                cached_tokens=stats["cached_tokens"],
                tokens=tokens,
                turns=tokens - accepted,
                drafted=[stats["drafted"]],
                accepted=[accepted],
                seconds=stats["seconds"],
            )


class _Chunk(NamedTuple):
    thought: str
    text: str
    ours: dict[str, Any]


def _chunks(response: http.client.HTTPResponse) -> Generator[_Chunk, None, None]:
    """The chunks of an event stream. Raises UserError for an error among them, or an end before the end."""
    with response:
        try:
            for line in response:
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if line.startswith(b"data:"):
                    yield _chunk(data)
        except (OSError, http.client.HTTPException) as error:
            raise _broken(error) from None
    raise UserError("the server ended the answer in its midst: ask again")


def _chunk(data: bytes) -> _Chunk:
    """One choice's delta; a chunk may have none, as that of the usage. Raises UserError for what the server calls an
    error, and for what is no chunk."""
    try:
        chunk = json.loads(data)
        error = chunk.get("error")
        message = error["message"] if error else None
        choices = chunk.get("choices")
        delta = choices[0].get("delta") if choices else None
        thought, text = ((delta or {}).get(name) or "" for name in ("reasoning_content", "content"))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"the server sends {data[:60]!r} in its stream: is it an OpenAI API?") from None
    if message is not None:
        raise UserError(f"the server says: {message}")
    return _Chunk(thought, text, chunk.get("baleen") or {})


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return f"the server says: {json.load(error)['error']['message']}"
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return f"the server answers with status {error.code}: is it an OpenAI API?"


def _broken(error: Exception) -> UserError:
    return UserError(f"the connection to the server broke ({error}): ask again")
