"""``/completions``: texts or token ids continued, a hole filled, a prompt's own probabilities told."""

from __future__ import annotations

import asyncio
import codecs
import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import Request
from starlette.responses import Response

from dsv3.data.fim import join
from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.api.answering import KEEP_ALIVE, Events, Server, Tally, finish, told, unless_gone
from dsv3.serve.api.errors import Json
from dsv3.serve.api.schemas import Completion, CompletionLogprobs, CompletionRequest, FinishReason
from dsv3.serve.api.worker import Job
from dsv3.serve.sequence import TokenLogprob
from dsv3.serve.updates import Update

DEFAULT_TOKENS = 16  # OpenAI's


def prompts(tokenizer: Tokenizer, body: CompletionRequest) -> list[list[int]]:
    """The prompts as token ids; an empty text is a begin-of-sentence token, as for :class:`dsv3.LLM`."""
    given = body.prompt
    if isinstance(given, str):
        ids = tokenizer.encode(given)
        if body.suffix is not None:
            return [join(tokenizer, ids, [], tokenizer.encode(body.suffix))]
        return [ids or [tokenizer.bos_id]]
    if isinstance(given[0], int):
        return [cast("list[int]", given)]
    if isinstance(given[0], str):
        return [tokenizer.encode(text) or [tokenizer.bos_id] for text in cast("list[str]", given)]
    return cast("list[list[int]]", given)


def count(body: CompletionRequest) -> int:
    """How many answers a request wants."""
    many = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    return (body.n or 1) * (len(body.prompt) if many else 1)


class Choice:
    """One answer in the making: updates go in, pieces of text and their log-probabilities come out.

    ``echo``: the prompt's token ids, which the text then begins with; ``of_prompt``: their log-probabilities,
    a list shared by the answers to a prompt, for they come with the first.
    """

    def __init__(
        self, server: Server, wanted: bool, echo: list[int] | None, of_prompt: list[TokenLogprob | None]
    ):
        self._server, self._wanted, self._echo, self._of_prompt = server, wanted, echo, of_prompt
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self.finish_reason: FinishReason | None = None

    def take(self, update: Update) -> tuple[str, CompletionLogprobs | None]:
        """What an update adds."""
        self.finish_reason = finish(update)
        text = update.text
        found: list[TokenLogprob | None] = list(self._server.shown(update))
        ids = [known.token_id for known in found if known is not None]
        if self._echo is not None:
            text = self._server.tokenizer.decode(self._echo) + text
            self._of_prompt += update.prompt_logprobs
            found = [*self._of_prompt, *found]
            ids = self._echo + ids
            self._echo = None
        return text, self._told(ids, found) if self._wanted else None

    def _told(self, ids: list[int], found: list[TokenLogprob | None]) -> CompletionLogprobs:
        told: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, known in zip(ids, found, strict=True):
            told["tokens"].append(self._name(token_id))
            told["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._server.tokenizer.token_bytes[token_id]))
            if known is None:  # nothing comes before the first token
                told["token_logprobs"].append(None)
                told["top_logprobs"].append(None)
                continue
            told["token_logprobs"].append(self._server.token(token_id, known.logprob)["logprob"])
            told["top_logprobs"].append(
                {self._name(other): self._server.token(other, value)["logprob"] for other, value in known.top}
            )
        return told

    def _name(self, token_id: int) -> str:
        """A token's text; where that is no whole text its bytes, as OpenAI wrote them: names must differ."""
        content = self._server.tokenizer.token_bytes[token_id]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


async def create(server: Server, body: CompletionRequest, request: Request) -> Response:
    """Continue prompts."""
    server.check(body)
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    own: dict[str, Any] = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        own["prompt_logprobs"] = body.logprobs
    params = server.params(body, limit, **own)

    def prepare() -> list[list[int]]:
        found = prompts(server.tokenizer, body)
        for prompt in found:
            server.engine.check(prompt, params)
        return found

    job = server.worker.open(f"cmpl-{uuid.uuid4().hex}", count(body))
    tally = Tally()
    try:
        ids = await asyncio.to_thread(prepare)
        await job.start(ids, params, server.settings.request_seconds)
        wanted = body.logprobs is not None
        choices = []
        for prompt in ids:
            of_prompt: list[TokenLogprob | None] = []
            echo = prompt if body.echo else None
            choices += [Choice(server, wanted, echo, of_prompt) for _ in range(params.n)]
        if body.stream:
            return Events(request, job, tally, _chunks(server, body, job, tally, choices))
        answer = await unless_gone(request, _whole(server, body, job, tally, choices))
    except BaseException:
        job.close()
        raise
    job.close()
    told(request, job, tally)
    return Json(answer)


async def _chunks(
    server: Server, body: CompletionRequest, job: Job, tally: Tally, choices: list[Choice]
) -> AsyncIterator[dict[str, Any] | None]:
    usage = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}
    async for found in job.updates(KEEP_ALIVE):
        if found is None:
            yield None
            continue
        number, update = found
        tally.add(update.usage)
        index = number * (body.n or 1) + update.index
        text, logprobs = choices[index].take(update)
        reason = choices[index].finish_reason
        if text or reason or (logprobs and logprobs["tokens"]):
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
            yield {**server.head(job, "text_completion"), "choices": [choice], **usage}
    if usage:
        yield {**server.head(job, "text_completion"), "choices": [], "usage": tally.body}


async def _whole(
    server: Server, body: CompletionRequest, job: Job, tally: Tally, choices: list[Choice]
) -> Completion:
    """The sum of the pieces."""
    texts = [""] * len(choices)
    logprobs: list[CompletionLogprobs] = [
        {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in choices
    ]
    async for found in job.updates():
        assert found is not None
        number, update = found
        tally.add(update.usage)
        index = number * (body.n or 1) + update.index
        text, told = choices[index].take(update)
        texts[index] += text
        if told is not None:
            known = logprobs[index]
            known["tokens"] += told["tokens"]
            known["token_logprobs"] += told["token_logprobs"]
            known["top_logprobs"] += told["top_logprobs"]
            known["text_offset"] += told["text_offset"]
    head = server.head(job, "text_completion")
    made = [
        {
            "index": index,
            "text": texts[index],
            "logprobs": logprobs[index] if body.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    return cast(Completion, {**head, "choices": made, "usage": tally.body})
