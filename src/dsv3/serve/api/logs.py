"""One JSON object a line, with the request's id; and the id itself, given back in ``X-Request-Id``."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3.serve.api.errors import internal
from dsv3.serve.api.metrics import Metrics

log = logging.getLogger("dsv3.serve")

_SAFE = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time, level, message, and whatever ``extra`` held."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in record.__dict__.items() if name not in _PLAIN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(level: str) -> None:
    """Log this house and uvicorn to the standard error, from ``level`` (debug, info, warning, error) on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name, least in (("dsv3", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(least)


class RequestLog:
    """The outermost layer: names each request, logs its end, and answers for what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE.fullmatch(given) else uuid.uuid4().hex
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        started, status = time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            log.exception("a request failed", extra={"request_id": request_id})
            if not status:
                await internal(request_id).response()(scope, receive, named)
        finally:
            self._metrics.http.labels(str(status or "none")).inc()
            quiet = scope["path"] in ("/health", "/metrics") and status == 200
            log.log(
                logging.DEBUG if quiet else logging.INFO, "request",
                extra={
                    "request_id": request_id, "method": scope["method"], "path": scope["path"][:200],
                    "status": status, "seconds": round(time.monotonic() - started, 4),
                    **state.get("told", {}),
                },
            )  # fmt: skip
