"""What stands before every endpoint: whose host, whose key, how large a body; and the headers of every response."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baleen.serve.errors import ApiError

OPEN_PATHS = ("/", "/health")
OPEN_FOLDER = "/page/"  # the chat page: it asks for the key itself
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types baleen"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
Responded = Callable[[str, int], None]


def is_loopback(host: str) -> bool:
    """Whether this name of a host is always this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """ASGI middleware.

    api_key None: no key is wanted, but then only requests addressed to this machine are let in, so that a web page
    elsewhere can't reach the server under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, body_bytes: int, responded: Responded):
        self._app, self._key, self._body_bytes, self._responded = app, api_key, body_bytes, responded
        self._too_large = f"the body has more than {body_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                route = scope.get("route")  # None: no such path, and no label of its own in the metrics
                self._responded(getattr(route, "path", "other"), message["status"])
            await send(message)

        fault = self._fault(scope["path"], Headers(scope=scope))
        if fault is not None:
            await fault.response(scope, receive, send_guarded)
            return
        await self._app(scope, self._bounded(receive), send_guarded)

    def _fault(self, path: str, headers: Headers) -> ApiError | None:
        if self._key is None:
            host = headers.get("host", "")
            name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.rpartition(":")[0] or host
            if not is_loopback(name):
                return ApiError(403, "without an API key this server answers only to 127.0.0.1 and localhost")
        elif path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key.encode())
            if scheme.lower() != "bearer" or not right:
                message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                return ApiError(401, message, code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._body_bytes:
            return ApiError(413, self._too_large, code="body_too_large")
        return None

    def _bounded(self, receive: Receive) -> Receive:
        read = 0

        async def receive_bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._body_bytes:  # it had no length, or a false one
                raise HTTPException(413, self._too_large)
            return message

        return receive_bounded
