"""Errors as the OpenAI protocol words them: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from baleen.config import UserError

TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told: `param` names the field at fault, `code` the fault, for programs to read."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status == 429:
            return {"Retry-After": "1"}
        # OpenAI's clients ask again after these two, which would only be computed, or fail, once more.
        return {"x-should-retry": "false"} if self.code in ("request_timeout", "engine_failed") else {}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class BadRequest(ApiError):
    """Status 400."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(400, message, param=param, code=code)


def install_handlers(app: FastAPI) -> None:
    """Every error of the app in the protocol's form, ours too (status 500, and a traceback in the log)."""

    async def api(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response

    async def user(request: Request, error: Exception) -> JSONResponse:
        return BadRequest(str(error)).response

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return explained(error.errors()).response

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # all that FastAPI says so: bytes that are no JSON
            return explained([{"type": "json_invalid", "loc": ()}]).response
        code = {404: "not_found", 413: "body_too_large"}.get(error.status_code)
        response = ApiError(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code
        ).response
        response.headers.update(error.headers or {})
        return response

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server failed; its log says how", code="internal_error").response

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(UserError, user)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, ours)


def explained(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One of pydantic's errors as a sentence. What was sent is not repeated: it may hold anything.

    Of the branches of a union it is that which was got furthest into, and was not merely of another type.
    """
    error = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    place = [str(part) for part in error["loc"] if part != "body"]
    param = place[0] if place else None  # what follows names pydantic's branches too
    if error["type"] == "json_invalid":
        return BadRequest("the body is not valid JSON", code="invalid_json")
    if error["type"] == "extra_forbidden":
        return BadRequest(f"{place[-1]!a} is not a parameter that this server knows", param=param, code="unknown_param")
    return BadRequest(f"{'.'.join(place) or 'the body'}: {error['msg']}", param=param, code="invalid_value")
