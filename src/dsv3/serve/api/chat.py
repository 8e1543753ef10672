"""``/chat/completions``: a conversation becomes a prompt, and an answer thoughts, content and tool calls."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import Request
from starlette.responses import Response

from dsv3.common.errors import UserError
from dsv3.data import special
from dsv3.data.chat import encode
from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.api.answering import KEEP_ALIVE, Events, Server, Tally, finish, told, unless_gone
from dsv3.serve.api.errors import Json
from dsv3.serve.api.markers import Thinking
from dsv3.serve.api.schemas import (
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatRequest,
    FinishReason,
    MadeCall,
    Message,
    NamedTool,
)
from dsv3.serve.api.tools import Arguments, Content, Part, ToolParser, grammar
from dsv3.serve.api.worker import Job
from dsv3.serve.updates import Update


def _message(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        found["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return found


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages for the template, which knows a tool's result only by its place.

    Results are put into the order of the calls they answer. Raises :class:`UserError` for a result without a
    call.
    """
    found: list[dict[str, Any]] = []
    order: dict[str, int] = {}
    results: list[tuple[int, dict[str, Any]]] = []
    for number, message in enumerate(messages):
        if message.role == "tool":
            place = order.get(message.tool_call_id or "")
            if place is None:
                raise UserError(
                    f"messages[{number}].tool_call_id ({message.tool_call_id!r}) answers no call of the"
                    " assistant's message before it"
                )
            results.append((place, _message(message)))
            continue
        found += [result for _, result in sorted(results, key=lambda pair: pair[0])]
        results = []
        order = {call.id: place for place, call in enumerate(message.tool_calls or [])}
        found.append(_message(message))
    return [*found, *(result for _, result in sorted(results, key=lambda pair: pair[0]))]


def prompt(tokenizer: Tokenizer, body: ChatRequest) -> tuple[list[int], bool]:
    """The token ids an answer continues, and whether they end inside of reasoning."""
    messages = conversation(body.messages)
    last = body.messages[-1]
    if last.prefix and last.reasoning_content:
        thought = f"{special.THINK}\n{last.reasoning_content}\n"
        said = f"{special.END_THINK}\n\n{last.text}" if last.text else ""
        messages[-1]["content"] = thought + said
    ids, _ = encode(
        tokenizer,
        messages,
        tools=[tool.model_dump(exclude_none=True) for tool in _tools(body)],
        add_generation_prompt=not last.prefix,
        continue_final=bool(last.prefix),
    )
    text = messages[-1]["content"] if last.prefix else ""
    return ids, special.THINK in text.rpartition(special.END_THINK)[2]


def _tools(body: ChatRequest) -> list[Any]:
    """The tools the model is told of: with tool_choice none, none."""
    return [] if body.tool_choice == "none" else body.tools or []


def _constraint(server: Server, body: ChatRequest) -> dict[str, Any]:
    """What a grammar must hold the answer to: a schema, a call, or one or the other."""
    form = body.response_format
    schema: dict[str, Any] | None = None
    if form is not None and form.type != "text":
        schema = form.json_schema.body if form.json_schema is not None else {"type": "object"}
    tools = [tool.model_dump(exclude_none=True) for tool in _tools(body)]
    many = body.parallel_tool_calls is not False
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        return {"grammar": grammar(tools, many=False)}
    if body.tool_choice == "required":
        return {"grammar": grammar(tools, many=many)}
    if schema is not None and tools:
        return {"grammar": grammar(tools, many=many, instead=schema)}
    return {} if schema is None else {"json_schema": schema}


class Choice:
    """One answer in the making: updates go in, the deltas of its message come out."""

    def __init__(self, server: Server, tools: bool, thinks: bool):
        self._server = server
        self._thinking = Thinking(thinks)
        self._tools = ToolParser() if tools else None
        self._end_think = server.tokenizer.added.get(special.END_THINK, -1)
        self.finish_reason: FinishReason | None = None
        self.reasoning_tokens = 0

    def take(self, update: Update) -> tuple[dict[str, Any], list[ChatLogprob]]:
        """What an update adds to the message, as a delta, and its tokens' log-probabilities."""
        before = self._thinking.state
        thought, said = self._thinking.feed(update.text)
        self._count(update.token_ids, before, self._thinking.state)
        self.finish_reason = finish(update)
        if self.finish_reason is not None:
            more, rest = self._thinking.close()
            thought, said = thought + more, said + rest
        parts: list[Part] = [Content(said)] if said and self._tools is None else []
        if self._tools is not None:
            parts = self._tools.feed(said)
            if self.finish_reason is not None:
                parts += self._tools.close()
            if self.finish_reason == "stop" and self._tools.calls:
                self.finish_reason = "tool_calls"
        logprobs = [
            cast(
                ChatLogprob,
                {
                    **self._server.token(found.token_id, found.logprob),
                    "top_logprobs": [self._server.token(*other) for other in found.top],
                },
            )
            for found in self._server.shown(update)
        ]
        return _delta(thought, parts), logprobs

    def _count(self, token_ids: list[int], before: str, after: str) -> None:
        """Tokens up to the one that ends the reasoning, itself included."""
        if "thinking" not in (before, after) and not (before == "start" and self._end_think in token_ids):
            return
        ended = after != "thinking" and self._end_think in token_ids
        self.reasoning_tokens += token_ids.index(self._end_think) + 1 if ended else len(token_ids)


def _delta(thought: str, parts: list[Part]) -> dict[str, Any]:
    delta: dict[str, Any] = {"reasoning_content": thought} if thought else {}
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if isinstance(part, Content):
            delta["content"] = delta.get("content", "") + part.text
        elif isinstance(part, Arguments):
            call = calls.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += part.text
        else:
            calls[part.index] = {
                "index": part.index, "id": part.id, "type": "function",
                "function": {"name": part.name, "arguments": ""},
            }  # fmt: skip
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


async def create(server: Server, body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    server.check(body)
    limit = body.max_completion_tokens or body.max_tokens or server.engine.max_length
    tools = bool(_tools(body))
    params = server.params(
        body,
        limit,
        skip_special=not tools,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **_constraint(server, body),
    )

    def prepare() -> tuple[list[int], bool]:  # a long text, a new schema: not on the event loop
        ids, thinks = prompt(server.tokenizer, body)
        server.engine.check(ids, params)
        return ids, thinks

    job = server.worker.open(f"chatcmpl-{uuid.uuid4().hex}", body.n or 1)
    tally = Tally()
    try:
        ids, thinks = await asyncio.to_thread(prepare)
        await job.start([ids], params, server.settings.request_seconds)
        choices = [Choice(server, tools, thinks) for _ in range(body.n or 1)]
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
    server: Server, body: ChatRequest, job: Job, tally: Tally, choices: list[Choice]
) -> AsyncIterator[dict[str, Any] | None]:
    usage = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**server.head(job, "chat.completion.chunk"), "choices": [choice], **usage}

    for index in range(len(choices)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for found in job.updates(KEEP_ALIVE):
        if found is None:
            yield None
            continue
        _, update = found
        tally.add(update.usage)
        choice = choices[update.index]
        delta, logprobs = choice.take(update)
        if delta or logprobs or choice.finish_reason:
            content = {"content": logprobs, "refusal": None} if body.logprobs else None
            yield chunk(update.index, delta, content, choice.finish_reason)
    tally.reasoning = sum(choice.reasoning_tokens for choice in choices)
    if usage:
        yield {**server.head(job, "chat.completion.chunk"), "choices": [], "usage": tally.body}


async def _whole(
    server: Server, body: ChatRequest, job: Job, tally: Tally, choices: list[Choice]
) -> ChatCompletion:
    """The sum of the deltas."""
    texts: list[dict[str, str]] = [{} for _ in choices]
    calls: list[dict[int, MadeCall]] = [{} for _ in choices]
    logprobs: list[list[ChatLogprob]] = [[] for _ in choices]
    async for found in job.updates():
        assert found is not None
        _, update = found
        tally.add(update.usage)
        delta, told = choices[update.index].take(update)
        logprobs[update.index] += told
        for call in delta.pop("tool_calls", []):
            known = calls[update.index].get(call["index"])
            if known is None:
                calls[update.index][call.pop("index")] = call
            else:
                known["function"]["arguments"] += call["function"]["arguments"]
        for name, text in delta.items():
            texts[update.index][name] = texts[update.index].get(name, "") + text
    tally.reasoning = sum(choice.reasoning_tokens for choice in choices)
    found_choices: list[ChatChoice] = []
    for index, choice in enumerate(choices):
        made = list(calls[index].values())
        message: ChatAnswer = {
            "role": "assistant",
            "content": texts[index].get("content", None if made else ""),
        }
        if "reasoning_content" in texts[index]:
            message["reasoning_content"] = texts[index]["reasoning_content"]
        if made:
            message["tool_calls"] = made
        assert choice.finish_reason is not None
        found_choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": {"content": logprobs[index], "refusal": None} if body.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
        )
    head = server.head(job, "chat.completion")
    return cast(ChatCompletion, {**head, "choices": found_choices, "usage": tally.body})
