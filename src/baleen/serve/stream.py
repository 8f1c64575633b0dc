"""Responses that are made while the client waits, and given up the moment it goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baleen.serve.errors import ApiError

DONE = b"data: [DONE]\n\n"
EVENT_STREAM = "text/event-stream"


class Live(Response):
    """Runs `send_to` against the wire and against the client's patience: whichever ends first ends the other.

    seconds: after which a client that takes nothing is cut off.
    """

    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    async def send_to(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._in_time(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(self._seconds):
            await self.send_to(scope, receive, send)


class Whole(Live):
    """One JSON body."""

    def __init__(self, answer: Awaitable[BaseModel], seconds: float):
        super().__init__(seconds)
        self._answer = answer

    async def send_to(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = (await self._answer).model_dump_json(exclude_unset=True)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        await Response(body, media_type="application/json")(scope, receive, send)


class EventStream(Live):
    """Server-sent events: chunks, then [DONE].

    The status waits for the first chunk, so that what goes wrong before it is an error like any other. What goes
    wrong later is an event of its own, before [DONE].
    """

    def __init__(self, chunks: AsyncIterator[BaseModel], seconds: float):
        super().__init__(seconds)
        self._chunks = chunks

    async def send_to(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async for chunk in self._chunks:
                data = f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n".encode()
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            if not begun:
                await error.response(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": b"data: %b\n\n" % error.response.body, "more_body": True})
        await send({"type": "http.response.body", "body": DONE})


HEADERS = [(b"content-type", f"{EVENT_STREAM}; charset=utf-8".encode()), (b"cache-control", b"no-store")]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
