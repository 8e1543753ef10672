"""What the chat and completions endpoints share: parameters, usage, and the two ways to send an answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

import dsv3
from dsv3.common.errors import UserError
from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.api.errors import ApiError, dumps
from dsv3.serve.api.schemas import FinishReason, Sampling, TopLogprob, UsageBody, unknown
from dsv3.serve.api.settings import Settings
from dsv3.serve.api.worker import CUT, Job, Worker
from dsv3.serve.engine import Engine
from dsv3.serve.params import LEAST_TEMPERATURE, LEAST_TOP_P, SamplingParams
from dsv3.serve.sequence import TokenLogprob
from dsv3.serve.updates import Update, Usage

log = logging.getLogger("dsv3.serve")
T = TypeVar("T")
KEEP_ALIVE = 10.0  # seconds without a token after which a stream says that it lives


@dataclass
class Server:
    """What an endpoint works with."""

    engine: Engine
    worker: Worker
    settings: Settings
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the code that computes."""
        return f"dsv3-{dsv3.__version__}"

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's; :func:`dsv3.serve.api.app.create_app` makes sure that there is one."""
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer

    def head(self, job: Job, kind: str) -> dict[str, Any]:
        """The fields every answer and every chunk of it begins with."""
        return {
            "id": job.id, "object": kind, "created": job.created,
            "model": self.settings.model_name, "system_fingerprint": self.fingerprint,
        }  # fmt: skip

    def check(self, body: Sampling) -> None:
        """Refuse another model's name, and tokens there are not; note fields that mean nothing."""
        name = self.settings.model_name
        if body.model not in (None, name):
            raise ApiError(
                404, f"the model {body.model!r} is not served here; {name!r} is", "model", "model_not_found"
            )
        worst = max((int(key) for key in body.logit_bias or {}), default=0)
        if worst >= self.engine.vocab_size:
            raise ApiError(
                422, f"logit_bias names token {worst}; there are {self.engine.vocab_size}", "logit_bias"
            )
        if log.isEnabledFor(logging.DEBUG) and (ignored := unknown(body)):
            log.debug("ignored fields", extra={"fields": ignored[:50]})

    def params(self, body: Sampling, max_tokens: int, **own: Any) -> SamplingParams:
        """The engine's parameters; ``own``: what only this endpoint has."""
        given = {
            name: getattr(body, name)
            for name in (
                "n", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty", "stop",
            )
            if getattr(body, name) is not None
        }  # fmt: skip
        # Numbers that FP32 would take for 0 mean what they come close to: the likeliest token.
        if given.get("temperature", 1) < LEAST_TEMPERATURE:
            given["temperature"] = 0
        given["top_p"] = max(given.get("top_p", 1), LEAST_TOP_P)
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=max(0, body.top_k or 0),
            seed=None if body.seed is None else body.seed % 2**62,
            logit_bias={int(key): value for key, value in (body.logit_bias or {}).items()},
            **{**given, **own},
        )

    def shown(self, update: Update) -> list[TokenLogprob]:
        """The log-probabilities of an update, without that of the token that ended the answer."""
        found = update.logprobs
        if update.finish_reason == "stop" and found and found[-1].token_id in self.engine.eos_ids:
            return found[:-1]
        return found

    def token(self, token_id: int, logprob: float) -> TopLogprob:
        """A token as OpenAI writes it."""
        content = self.tokenizer.token_bytes[token_id]
        return {
            "token": content.decode("utf-8", "replace"),
            "logprob": max(logprob, -9999.0),  # minus infinity is no number of JSON's
            "bytes": list(content),
        }


def finish(update: Update) -> FinishReason | None:
    """Why an answer ended, in the API's words."""
    if update.finish_reason in ("error", "abort"):
        raise ApiError(500, "the model's numbers or the grammar failed; this answer was given up")
    assert update.finish_reason in (None, "stop", "length", CUT)
    return cast("FinishReason | None", update.finish_reason)


@dataclass
class Tally:
    """Tokens of a whole HTTP request."""

    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0, 0, 0))
    reasoning: int = 0

    def add(self, usage: Usage | None) -> None:
        """A prompt's usage, when it has ended."""
        if usage is not None:
            self.usage = Usage(*(a + b for a, b in zip(_numbers(self.usage), _numbers(usage))))

    @property
    def body(self) -> UsageBody:
        """As OpenAI and DeepSeek write it."""
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_cache_hit_tokens": usage.cached_tokens,
            "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "accepted_prediction_tokens": usage.accepted,
                "rejected_prediction_tokens": usage.drafted - usage.accepted,
            },
        }


def _numbers(usage: Usage) -> tuple[int, ...]:
    return usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.drafted, usage.accepted


def told(request: Request, job: Job, tally: Tally) -> None:
    """What the log says of a request beside its status."""
    usage = tally.usage
    request.state.told = {
        "id": job.id, "outcome": job.outcome, "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens, "cached_tokens": usage.cached_tokens,
    }  # fmt: skip


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, given up when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client went away")
    finally:
        working.cancel()
        watching.cancel()


class Events(StreamingResponse):
    """Server-sent events of a job; however the response ends, the job is closed."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, job: Job, tally: Tally, chunks: AsyncIterator[Mapping[str, Any] | None]
    ):
        super().__init__(_lines(chunks), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._request, self._job, self._tally = request, job, tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()
            told(self._request, self._job, self._tally)


async def _lines(chunks: AsyncIterator[Mapping[str, Any] | None]) -> AsyncIterator[bytes]:
    """``data:`` lines; None is a comment that keeps the connection open. An error is the last but [DONE]."""
    try:
        async for chunk in chunks:
            yield b": keep-alive\n\n" if chunk is None else b"data: " + dumps(chunk) + b"\n\n"
    except (ApiError, UserError) as error:
        body = error.body if isinstance(error, ApiError) else ApiError(422, str(error)).body
        yield b"data: " + dumps(body) + b"\n\n"
    yield b"data: [DONE]\n\n"
