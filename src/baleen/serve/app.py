"""The app: routes of the OpenAI API and of the chat page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from baleen.serve.answers import ChatCompletion, Completion, ErrorBody, Health, Html, ModelCard, ModelList, Tokens
from baleen.serve.chat import Chat
from baleen.serve.completions import Completions
from baleen.serve.errors import ApiError, install_handlers
from baleen.serve.gate import Gate
from baleen.serve.metrics import CONTENT_TYPE
from baleen.serve.prompt import beginning, conversation
from baleen.serve.protocol import ChatRequest, CompletionRequest, RenderRequest, TokenizeRequest
from baleen.serve.render import Renderer
from baleen.serve.service import Service
from baleen.serve.stream import EVENT_STREAM, EventStream, Whole

PATIENCE = 30.0  # seconds beyond the limit of a request after which a client that takes nothing is cut off
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503)
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}}


def create_app(service: Service, *, api_key: str | None = None, origins: Sequence[str] = ()) -> FastAPI:
    """The app over a service, whose worker it starts and stops.

    api_key: wanted of everybody who asks for more than the page. origins: web pages elsewhere that may ask (CORS).
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        yield
        await run_in_threadpool(service.worker.stop)

    app = FastAPI(title="Baleen", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.include_router(api_routes(service))
    app.include_router(page_routes())
    install_handlers(app)
    app.add_middleware(Gate, api_key=api_key, body_bytes=service.limits.body_bytes, responded=service.metrics.responded)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.openapi = lambda: described(app, service)  # type: ignore[method-assign]
    return app


def api_routes(service: Service) -> APIRouter:
    router = APIRouter()
    seconds = service.limits.request_seconds + PATIENCE

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
    async def chat_completions(request: ChatRequest) -> Response:
        chat = await run_in_threadpool(Chat, service, request)
        return EventStream(chat.chunks(), seconds) if request.stream else Whole(chat.answer(), seconds)

    @router.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def completions(request: CompletionRequest) -> Response:
        completions = await run_in_threadpool(Completions, service, request)
        return EventStream(completions.chunks(), seconds) if request.stream else Whole(completions.answer(), seconds)

    @router.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(object="list", data=[model.card for model in service.models])

    @router.get("/v1/models/{name}")
    async def model(name: str) -> ModelCard:
        return service.models.get(name).card

    @router.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Tokens:
        model = service.models.get(request.model)

        def encoded() -> list[int]:
            if request.messages is not None:
                return conversation(model.tokenizer, request.messages, system=model.system)
            return [*beginning(model.tokenizer), *model.tokenizer.encode(request.prompt or "")]

        ids = await run_in_threadpool(encoded)
        return Tokens(tokens=ids, count=len(ids), max_model_len=model.engine.context)

    @router.get("/health")
    async def health() -> Health:
        if service.worker.failed:
            raise ApiError(503, "the engine has failed: start the server anew", code="engine_failed")
        return Health(status="ok")

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


def page_routes() -> APIRouter:
    """The chat page and the rendering of its Markdown."""
    router = APIRouter()
    renderer = Renderer()
    files = {file.name: file.read_bytes() for file in resources.files("baleen.serve").joinpath("page").iterdir()}

    def file(name: str) -> Response:
        media_type = MEDIA_TYPES.get(name[name.rfind(".") :])
        if name not in files or media_type is None:
            raise ApiError(404, f"the page has no file {name[:100]!a}", code="not_found")
        return Response(files[name], headers={"Content-Type": media_type, "Cache-Control": "no-cache"})

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return file("index.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        return file(name)

    @router.post("/render")
    async def render(request: RenderRequest) -> Html:
        return Html(html=await run_in_threadpool(renderer.html, request.text))

    return router


def described(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI schema, with this server's models and limits in it."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        vocab_size = min(model.engine.model.config.vocab_size for model in service.models)
        for parts in schema["components"]["schemas"].values():
            fields = parts.get("properties", {})
            if "model" in fields and parts.get("additionalProperties") is False:
                fields["model"]["enum"] = service.models.names
            if "n" in fields:
                fields["n"]["anyOf"][0]["maximum"] = service.limits.choices
            if "logit_bias" in fields:
                bias = fields["logit_bias"]["anyOf"][0]
                (value,) = bias["patternProperties"].values()
                bias |= {"patternProperties": {numbers_below(vocab_size): value}, "additionalProperties": False}
            for prompt in fields.get("prompt", {}).get("anyOf", ()):
                items = prompt.get("items", {})
                if items.get("type") != "integer" and prompt["type"] == "array":
                    prompt["maxItems"] = service.limits.choices
                ids = items.get("items", items)
                if ids.get("type") == "integer":
                    ids.pop("exclusiveMaximum", None)
                    ids["maximum"] = vocab_size - 1
        app.openapi_schema = schema
    return app.openapi_schema


def numbers_below(limit: int) -> str:
    """A regular expression of the decimal numbers from 0 to `limit` - 1."""
    digits = str(limit)
    parts = [f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else []
    for place, digit in enumerate(digits):
        if digit > "0":
            parts.append(f"{digits[:place]}[0-{int(digit) - 1}][0-9]{{{len(digits) - place - 1}}}")
    return f"^({'|'.join(parts)})$"
