"""A server of the page whose answers are written down beforehand: what a model would hardly say on demand.

An answer is found by the last message of the request; it streams in pieces of a few letters, as tokens do, with a made-up
but repeatable trace. `python tests/serve/scripted_server.py` serves it for a look by hand.
"""

import asyncio
import json
import random
import re
import threading
from dataclasses import dataclass, field
from importlib import resources

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from baleen.serve.render import Renderer

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types baleen"
)
MEDIA = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
SHAPE = {"layers": 5, "first_moe_layer": 1, "experts": 16, "experts_per_token": 4, "mtp_layers": 1}
CARD = {**SHAPE, "thinking": True, "tools": True, "chat": True, "parameters": 5_600_000, "active_parameters": 2_100_000}
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0, "max_tokens": None}


@dataclass
class Script:
    """What is answered, and what was asked."""

    answers: dict[str, str]  # by the last message; "" for any other. "<think>…</think>" is reasoning
    delay: float = 0.002  # seconds a token
    key: str | None = None
    requests: list[dict] = field(default_factory=list)
    cut_off: int = 0  # streams that the page left before their end
    release: threading.Event = field(default_factory=threading.Event)  # a "⏸" in an answer waits for it

    def answer(self, body: dict) -> str:
        return self.answers.get(body["messages"][-1]["content"], self.answers[""])


def create_app(script: Script) -> FastAPI:
    app = FastAPI()
    renderer = Renderer()
    page = resources.files("baleen.serve").joinpath("page")

    @app.middleware("http")
    async def guard(request: Request, call_next):
        is_open = request.url.path == "/" or request.url.path.startswith("/page/")
        if script.key and not is_open and request.headers.get("authorization") != f"Bearer {script.key}":
            return JSONResponse({"error": {"message": "wrong key", "code": "invalid_api_key"}}, 401)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CSP
        return response

    @app.get("/")
    @app.get("/page/{name}")
    def file(name: str = "index.html") -> Response:
        return Response(page.joinpath(name).read_bytes(), media_type=MEDIA[name.rpartition(".")[2]])

    @app.post("/render")
    def render(body: dict) -> dict:
        return {"html": renderer.html(body["text"])}

    @app.get("/v1/models")
    def models() -> dict:
        names = ["chitchat", "smollm2-upcycled"]
        cards = [{"id": n, "object": "model", "max_model_len": 512, "baleen": {**CARD, "sampling": SAMPLING}} for n in names]
        return {"object": "list", "data": cards}

    @app.post("/v1/chat/completions")
    def chat(body: dict) -> Response:
        script.requests.append(body)
        text = script.answer(body)
        if text.startswith("!"):
            return JSONResponse({"error": {"message": text[1:], "code": "busy"}}, 429)
        return StreamingResponse(_stream(script, text), media_type="text/event-stream")

    return app


async def _stream(script: Script, text: str):
    chance = random.Random(text)
    favourites = [chance.sample(range(SHAPE["experts"]), 7) for _ in range(SHAPE["layers"])]
    thought, _, content = text.rpartition("</think>")
    tokens = [("reasoning", piece) for piece in _pieces(thought.removeprefix("<think>"))]
    tokens += [("content", piece) for piece in _pieces(content)]
    accepted = 0
    ended = False
    try:
        for index, (part, piece) in enumerate(tokens):
            if piece == "⏸":
                while not script.release.is_set():
                    await asyncio.sleep(0.01)
                continue
            if piece == "✂":
                yield _event({"error": {"message": "the model ran away", "code": "internal_error"}})
                return
            await asyncio.sleep(script.delay)
            kept = index > 0 and chance.random() < 0.6
            accepted += kept
            used = [chance.sample(f, 2) + chance.sample([e for e in range(16) if e not in f], 2) for f in favourites]
            delta = {"reasoning_content" if part == "reasoning" else "content": piece}
            baleen = {"tokens": [{"text": piece, "accepted": kept, "part": part}], "experts": [used] if index else []}
            yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "baleen": baleen})
        thinking = sum(part == "reasoning" for part, _ in tokens)
        stats = {"prompt_tokens": 128, "cached_tokens": 96, "completion_tokens": len(tokens), "reasoning_tokens": thinking}
        stats |= {"seconds": 2.4, "first_token_seconds": 0.085, "tokens_per_second": 61.3, "drafted": len(tokens)}
        stats |= {"accepted": accepted, "device_seconds": 2.4, "joules": 43.2, "energy_how": "estimated", "usd": 1.3e-6}
        reason = "length" if text.endswith("…") else "stop"
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "baleen": {"tokens": [], "stats": stats}}
        yield _event(last)
        yield "data: [DONE]\n\n"
        ended = True
    finally:
        script.cut_off += not ended


def _pieces(text: str) -> list[str]:
    return re.findall(r"[⏸✂]|\s?\w{1,5}|\s+|[^\w\s]", text)


def _event(chunk: dict) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


class Server:
    """The app on a free port, in a thread; stops when the `with` ends."""

    def __init__(self, script: Script, port: int = 0):
        config = uvicorn.Config(create_app(script), host="127.0.0.1", port=port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(5)
