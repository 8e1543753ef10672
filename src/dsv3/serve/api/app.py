"""The application: endpoints, what stands before them, and the life of the engine's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import dsv3
from dsv3.common.errors import UserError
from dsv3.serve import page
from dsv3.serve.api import chat, completions, errors
from dsv3.serve.api.answering import Server
from dsv3.serve.api.errors import ApiError, Json
from dsv3.serve.api.limits import Limits
from dsv3.serve.api.logs import RequestLog
from dsv3.serve.api.metrics import Metrics
from dsv3.serve.api.schemas import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ModelCard,
    ModelList,
)
from dsv3.serve.api.settings import Settings
from dsv3.serve.api.worker import Worker
from dsv3.serve.engine import Engine

PREFIXES = ("/v1", "", "/beta")  # OpenAI's and DeepSeek's; the document names the first
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 413, 422, 429, 500, 503)
}


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """The API over an engine, which from the start of the application on belongs to its thread.

    ``app.state.worker`` is the thread's keeper. Raises :class:`UserError` for an engine without a tokenizer.
    """
    if engine.tokenizer is None:
        raise UserError("serving needs a tokenizer: the model's folder has no tokenizer.json")
    settings = settings or Settings()
    metrics = Metrics(engine)
    server = Server(engine, Worker(engine, metrics, settings.max_queue), settings)
    worker = server.worker

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.begin()
        yield
        await worker.end()

    # The framework's own pages of documentation fetch scripts elsewhere: only the document is served.
    app = FastAPI(
        title="dsv3", version=dsv3.__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="A DeepSeek-V3 model behind OpenAI's and DeepSeek's API.",
    )  # fmt: skip
    app.state.worker = worker
    pages = page.files()
    app.add_middleware(
        Limits, keys=settings.api_keys, free=["/health", *pages], max_body=settings.max_body,
        stall_seconds=settings.stall_seconds,
    )  # fmt: skip
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"], expose_headers=["X-Request-Id"],
        )  # fmt: skip
    app.add_middleware(RequestLog, metrics=metrics)
    errors.install(app)
    for prefix in PREFIXES:
        app.include_router(_endpoints(server), prefix=prefix, include_in_schema=prefix == "/v1")
    _operators(app, server, metrics)
    _pages(app, pages)
    return app


def _endpoints(server: Server) -> APIRouter:
    router = APIRouter(responses=_ERRORS)

    @router.post("/chat/completions", responses=_answers(ChatCompletion))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat.create(server, body, request)

    @router.post("/completions", responses=_answers(Completion))
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        return await completions.create(server, body, request)

    def card() -> ModelCard:
        return {
            "id": server.settings.model_name, "object": "model", "created": server.created,
            "owned_by": "dsv3", "max_model_len": server.engine.max_length,
        }  # fmt: skip

    @router.get("/models")
    async def models() -> ModelList:
        return {"object": "list", "data": [card()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> ModelCard:
        if name != server.settings.model_name:
            raise ApiError(404, f"the model {name!r} is not served here", "model", "model_not_found")
        return card()

    return router


def _answers(model: Any) -> dict[int | str, dict[str, Any]]:
    events = {"description": "with stream: events, each a chunk; the last is [DONE]"}
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string", **events}}}}}


def _operators(app: FastAPI, server: Server, metrics: Metrics) -> None:
    worker = server.worker

    @app.get("/health", responses={503: {"description": "draining, or failed"}})
    async def health() -> Response:
        """``ok``; with 503 ``draining`` or ``failed``."""
        status = "failed" if worker.failed else "draining" if worker.draining else "ok"
        return Json({"status": status, "open_answers": worker.open_answers}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")


def _pages(app: FastAPI, pages: dict[str, tuple[str, bytes]]) -> None:
    for path, (media_type, content) in pages.items():

        async def show(media_type: str = media_type, content: bytes = content) -> Response:
            return Response(content, media_type=media_type, headers=page.HEADERS)

        app.add_api_route(path, show, include_in_schema=False)


async def drain(worker: Worker, seconds: float) -> None:
    """Take nothing new; let what is open finish, and after ``seconds`` end it where it is."""
    worker.draining = True
    end = time.monotonic() + seconds
    while worker.jobs and time.monotonic() < end:
        await asyncio.sleep(0.05)
    for job in list(worker.jobs.values()):
        job.cut()
    end = time.monotonic() + 5
    while worker.jobs and time.monotonic() < end:
        await asyncio.sleep(0.05)
