"""The released chat format in one place: a renderer for training and a Jinja template for everyone else.

``<BOS>{system prompts, blank line between}<｜User｜>{question}<｜Assistant｜>{answer}<EOS>``, without line
breaks between turns. Both forms give the same text (tested); :func:`encode` also keeps text that merely looks
like a control token from becoming one. Two differences from the released template, which loses text:
``keep_think`` can keep the reasoning before ``</think>``, and a conversation may call tools more than once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv3.common.errors import UserError
from dsv3.data import special as s

if TYPE_CHECKING:
    from dsv3.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")

# Variables: messages, tools, add_generation_prompt, keep_think (all but the first may be undefined).
TEMPLATE = (
    """
{%- set keep_think = keep_think is defined and keep_think -%}
{%- set ns = namespace(system='', first=true, tool=false) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] -%}
    {%- set ns.first = false -%}
  {%- elif message['role'] not in ['user', 'assistant', 'tool'] -%}
    {{- raise_exception('role must be system, user, assistant or tool, not ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if tools is defined and tools -%}
  {%- set ns.system = ns.system + ('' if ns.first else '\\n\\n')
      + '## Tools\\n\\nYou have access to the following tools:' -%}
  {%- for tool in tools -%}
    {%- set ns.system = ns.system + '\\n\\n### ' + tool['function']['name']
        + '\\nDescription: ' + (tool['function']['description'] if tool['function']['description'] else '')
        + '\\nParameters: '
        + (tool['function']['parameters'] if tool['function']['parameters'] else {}) | tojson -%}
  {%- endfor -%}
{%- endif -%}
{{- 'BOS' + ns.system -}}
{%- for message in messages -%}
  {%- set content = message['content'] if message['content'] else '' -%}
  {%- if message['role'] == 'user' -%}
    {{- ('TOOL_OUTPUTS_END' if ns.tool else '') + 'USER' + content -}}
    {%- set ns.tool = false -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- if '</think>' in content and not keep_think -%}
      {%- set content = content.split('</think>')[-1] -%}
    {%- endif -%}
    {{- ('TOOL_OUTPUTS_END' if ns.tool else 'ASSISTANT') + content -}}
    {%- set ns.tool = false -%}
    {%- if message['tool_calls'] -%}
      {{- 'TOOL_CALLS_BEGIN' -}}
      {%- for call in message['tool_calls'] -%}
        {%- set arguments = call['function']['arguments'] -%}
        {{- ('' if loop.first else '\\n') + 'TOOL_CALL_BEGIN' + (call['type'] if call['type'] else 'function')
            + 'TOOL_SEP' + call['function']['name'] + '\\n```json\\n'
            + (arguments if arguments is string else arguments | tojson) + '\\n```TOOL_CALL_END' -}}
      {%- endfor -%}
      {{- 'TOOL_CALLS_END' -}}
    {%- endif -%}
    {{- 'EOS' -}}
  {%- elif message['role'] == 'tool' -%}
    {{- ('' if ns.tool else 'TOOL_OUTPUTS_BEGIN') + 'TOOL_OUTPUT_BEGIN' + content + 'TOOL_OUTPUT_END' -}}
    {%- set ns.tool = true -%}
  {%- endif -%}
{%- endfor -%}
{{- 'TOOL_OUTPUTS_END' if ns.tool else '' -}}
{{- 'ASSISTANT' if add_generation_prompt and not ns.tool else '' -}}
"""
).strip()
# The strings of the special tokens are written once, in special.py.
TEMPLATE = re.sub(
    r"(?<=['`])(BOS|EOS|USER|ASSISTANT|TOOL_[A-Z_]+)(?=')", lambda m: getattr(s, m[0]), TEMPLATE
)


@dataclass(frozen=True)
class Piece:
    """A run of rendered text. ``control``: special tokens; ``answer``: written by the assistant."""

    text: str
    control: bool = False
    answer: bool = False


@dataclass(frozen=True)
class Rendered:
    """Rendered text and the (start, stop) characters of the assistant's answers, end of sentence included."""

    text: str
    spans: list[tuple[int, int]]


def _check(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{number}] ({message!r}) must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"messages[{number}].role ({role!r}) must be one of {', '.join(ROLES)}")
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise UserError(f"messages[{number}].content ({content!r}) must be a string")
        _check_functions(calls, f"messages[{number}].tool_calls", ("name", "arguments"))
    _check_functions(tools, "tools", ("name",))


def _check_functions(found: Any, where: str, wanted: tuple[str, ...]) -> None:
    """Calls and tools are lists of ``{"function": {...}}``."""
    if found is None:
        return
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise UserError(f"{where} ({found!r}) must be a list")
    for number, one in enumerate(found):
        function = one.get("function") if isinstance(one, Mapping) else None
        if not isinstance(function, Mapping) or any(function.get(key) is None for key in wanted):
            raise UserError(f"{where}[{number}] ({one!r}) must have function.{' and function.'.join(wanted)}")
        if not isinstance(function["name"], str):
            raise UserError(f"{where}[{number}].function.name ({function['name']!r}) must be a string")


def _system(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
    parts = [message["content"] for message in messages if message["role"] == "system"]
    if tools:
        lines = ["## Tools\n\nYou have access to the following tools:"]
        for tool in tools:
            function = tool["function"]
            parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
            description = function.get("description") or ""
            lines.append(f"### {function['name']}\nDescription: {description}\nParameters: {parameters}")
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts)


def _answer(message: Message, keep_think: bool) -> list[Piece]:
    content = message.get("content") or ""
    if not keep_think:
        content = content.split(s.END_THINK)[-1]
    pieces = [
        Piece(text, control=bool(place % 2), answer=True)
        for place, text in enumerate(re.split(f"({s.THINK}|{s.END_THINK})", content))
    ]
    calls = message.get("tool_calls") or []
    if calls:
        pieces.append(Piece(s.TOOL_CALLS_BEGIN, True, True))
    for number, call in enumerate(calls):
        function = call["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        pieces += [
            Piece("\n" if number else "", answer=True),
            Piece(s.TOOL_CALL_BEGIN, True, True),
            Piece(call.get("type") or "function", answer=True),
            Piece(s.TOOL_SEP, True, True),
            Piece(f"{function['name']}\n```json\n{arguments}\n```", answer=True),
            Piece(s.TOOL_CALL_END, True, True),
        ]
    if calls:
        pieces.append(Piece(s.TOOL_CALLS_END, True, True))
    return [*pieces, Piece(s.EOS, True, True)]


def pieces(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    keep_think: bool = False,
    continue_final: bool = False,
) -> list[Piece]:
    """A conversation as runs of text, each marked as control tokens or not, answer or not.

    ``messages``: dicts with ``role`` and ``content`` (and ``tool_calls``), as in the OpenAI API; ``tools``:
    the API's function descriptions, told in the system prompt. ``continue_final``: the last message, the
    assistant's, is the beginning of an answer: its reasoning stays and nothing ends it. Raises
    :class:`UserError` naming what is malformed.
    """
    _check(messages, tools)
    found = [Piece(s.BOS, control=True), Piece(_system(messages, tools))]
    after_tool = False
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            if not after_tool:
                found.append(Piece(s.TOOL_OUTPUTS_BEGIN, control=True))
            found += [
                Piece(s.TOOL_OUTPUT_BEGIN, True),
                Piece(message["content"]),
                Piece(s.TOOL_OUTPUT_END, True),
            ]
            after_tool = True
        elif role != "system":
            if after_tool:
                found.append(Piece(s.TOOL_OUTPUTS_END, control=True))
            if role == "user":
                found += [Piece(s.USER, control=True), Piece(message["content"])]
            else:
                if not after_tool:
                    found.append(Piece(s.ASSISTANT, control=True))
                final = continue_final and number == len(messages) - 1
                answer = _answer(message, keep_think or final)
                found += answer[:-1] if final else answer
            after_tool = False
    if after_tool:
        found.append(Piece(s.TOOL_OUTPUTS_END, control=True))
    elif add_generation_prompt:
        found.append(Piece(s.ASSISTANT, control=True))
    return [piece for piece in found if piece.text]


def render(messages: Sequence[Message], **options: Any) -> Rendered:
    """The conversation as text, equal to what :data:`TEMPLATE` gives; options as for :func:`pieces`."""
    text, spans = "", []
    start = None
    for piece in pieces(messages, **options):
        if piece.answer and start is None:
            start = len(text)
        if not piece.answer and start is not None:
            spans.append((start, len(text)))
            start = None
        text += piece.text
    if start is not None:
        spans.append((start, len(text)))
    return Rendered(text, spans)


def encode(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether the assistant wrote it (the tokens SFT trains on).

    Control tokens come from the format alone: a user who types ``<｜Assistant｜>`` gets ordinary tokens.
    """
    ids: list[int] = []
    answer: list[bool] = []
    for piece in pieces(messages, **options):
        new = tokenizer.encode(piece.text, special=piece.control)
        ids += new
        answer += [piece.answer] * len(new)
    return ids, answer
