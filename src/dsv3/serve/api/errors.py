"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` and a status.

| status | what is wrong |
|---|---|
| 400 | the body is not JSON, or the prompt is longer than the model's context |
| 401 | no API key, or one that is not known |
| 404, 405 | no such path or model; a path that does not take this method |
| 408, 413 | the body comes too slowly, is too large |
| 422 | a field's value, as DeepSeek's own API answers |
| 429 | too many requests are open (``Retry-After`` says when to come back) |
| 500 | our failure: nothing of it is told but the request's id, which the log has too |
| 503 | the server is shutting down |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dsv3.common.errors import UserError

log = logging.getLogger("dsv3.serve")

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
TOLD = 500  # characters of a message at most: it may quote what the client sent


class ApiError(Exception):
    """An answer that is an error. ``retry_after``: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        message = self.message if len(self.message) <= TOLD else self.message[:TOLD] + "..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Json(self.body, self.status, headers)


class Json(Response):
    """JSON that can always be sent: a lone surrogate, which a client may have sent us, becomes ``?``."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def dumps(content: Any) -> bytes:
    """JSON in UTF-8, without spaces."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )


def internal(request_id: str) -> ApiError:
    """Our own failure."""
    return ApiError(500, f"the server failed on this request; its log has more under {request_id}")


def refused(error: UserError) -> ApiError:
    """What the engine refuses."""
    long = "max_length" in str(error)
    return ApiError(400 if long else 422, str(error), code="context_length_exceeded" if long else None)


def _named(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The field of the first thing wrong with a request, and a line on it that quotes a short value only.

    Of a value that may be one of several kinds, the kind that fits furthest: it is the one that was meant.
    """
    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    first = max(same, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))
    field = ".".join(str(part) for part in first["loc"] if part != "body" and not _is_kind(part))
    if not field and first["type"] in ("missing", "model_attributes_type"):
        return "", "the body must be a JSON object, sent with the header Content-Type: application/json"
    value = first.get("input")
    said = f" ({value!r})" if isinstance(value, str | int | float) and len(repr(value)) <= 40 else ""
    why = str(first["msg"]).removeprefix("Value error, ")
    return field, f"{field}{said}: {why}" if field else why


def _is_kind(part: str | int) -> bool:
    """Whether a part of a place is no field but one of the kinds that a value may be."""
    return isinstance(part, str) and (part in ("str", "constrained-str") or "[" in part or part[:1].isupper())


def install(app: FastAPI) -> None:
    """Let every error leave the application in this shape; what nobody foresaw is :mod:`.logs`' to answer."""

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_user_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        return refused(error).response()

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        field, line = _named(error.errors())
        if error.errors()[0]["type"] == "json_invalid":
            return ApiError(400, "the body is not valid JSON").response()
        return ApiError(422, line, param=field or None).response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = error.detail
        if said == HTTPStatus(error.status_code).phrase:  # the framework's own words
            said = f"{request.method} {request.url.path}: {said.lower()}"
        answer = ApiError(error.status_code, said).response()
        answer.headers.update(error.headers or {})
        return answer

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(UserError, on_user_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
