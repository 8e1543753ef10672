"""Tool calls in the V3 template, read while they are written, and the grammar that makes a model call.

``<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`` and, on new lines, a fenced json
block with the arguments, ``<｜tool▁call▁end｜>`` ... ``<｜tool▁calls▁end｜>``.

Control tokens never reach the content. What is malformed ends cleanly: a call whose name never became clear
is given back as content, without its control tokens; one whose arguments break off keeps those there are (a
client must expect arguments that are not valid JSON, as with OpenAI); any control token ends a call; text
between calls and after them is content unless it is white space.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.data import special as s
from dsv3.serve.api.markers import Markers
from dsv3.serve.grammar import JSON_OPTIONS

# Arguments as json.dumps writes them, and the template with it: a model that likes spaces cannot lose itself.
_ON_A_LINE = {
    **JSON_OPTIONS, "whitespace_flexible": False, "whitespace_pattern": None,
    "item_separator": ", ", "key_separator": ": ",
}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
MOST_CALLS = 16  # in one answer, where a grammar makes the model call
_HIDDEN = [string for string, _ in s.CONTROL if string not in s.SHOWN] + list(s.FIRST)
_LONGEST_HEAD = 4096  # characters from a call's name to its arguments
_HEAD = re.compile(r"(?P<name>[^\n]*)\n\s*(?:```[^\n]*\n|(?=[^\s`])|(?=`{1,2}[^`]))")


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call begins: the ``index``-th of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments, JSON as text."""

    index: int
    text: str


Part = Content | Call | Arguments


def new_id() -> str:
    """A name for a call."""
    return f"call_{secrets.token_hex(12)}"


class ToolParser:
    """Reads one answer, control tokens written out; ``calls``: how many have begun."""

    def __init__(self, new_id: Callable[[], str] = new_id):
        self.calls = 0
        self._new_id = new_id
        self._markers = Markers(_HIDDEN)
        self._state = "content"  # then between, kind, head, arguments
        self._held = ""  # of a call: what is read of its head, or may be the fence behind its arguments
        self._empty = True

    def feed(self, text: str) -> list[Part]:
        """More of the answer."""
        return self._take(self._markers.feed(text))

    def close(self) -> list[Part]:
        """The answer has ended."""
        return [*self._take(self._markers.close()), *self._end()]

    def _take(self, pieces: list[str]) -> list[Part]:
        found: list[Part] = []
        for piece in pieces:
            found += self._marker(piece) if piece in _HIDDEN else self._text(piece)
        return found

    def _marker(self, marker: str) -> list[Part]:
        if marker == s.TOOL_SEP and self._state == "kind":
            self._state, self._held = "head", ""
            return []
        found = self._end()
        if marker == s.TOOL_CALL_BEGIN:
            self._state = "kind"
        elif marker == s.TOOL_CALLS_BEGIN or self._state != "content":
            self._state = "between"
        return found

    def _text(self, text: str) -> list[Part]:
        if self._state == "content":
            return [Content(text)]
        self._held += text
        if self._state == "between":
            return self._give_back() if self._held.strip() else []
        if self._state == "kind":
            return []
        found: list[Part] = []
        if self._state == "head":
            head = _HEAD.match(self._held[:_LONGEST_HEAD])
            if head is None or not NAME.fullmatch(head["name"].strip()):
                return self._give_back() if len(self._held) >= _LONGEST_HEAD else []
            found.append(Call(self.calls, self._new_id(), head["name"].strip()))
            self.calls += 1
            self._state, self._held, self._empty = "arguments", self._held[head.end() :], True
        text = _without_fence(self._held)
        self._held = self._held[len(text) :]
        return [*found, *self._say(text)]

    def _say(self, text: str) -> list[Part]:
        self._empty &= not text
        return [Arguments(self.calls - 1, text)] if text else []

    def _give_back(self) -> list[Part]:
        """What is read is content, and what follows too, up to the next control token."""
        held, self._held, self._state = self._held, "", "content"
        return [Content(held)]

    def _end(self) -> list[Part]:
        """End what is open: nothing of a call goes on behind here."""
        held, self._held = self._held, ""
        if self._state == "arguments":
            self._state = "between"
            return self._say("{}") if self._empty else []
        if self._state in ("kind", "head"):
            self._state = "between"
        return [Content(held)] if held.strip() else []


def _without_fence(text: str) -> str:
    """Without what may be the end of the fence: the arguments are JSON, where it means nothing."""
    rest = text.rstrip()
    bare = rest.rstrip("`")
    return rest if bare == rest else rest[: max(len(bare), len(rest) - 3)].rstrip()


def grammar(
    tools: Sequence[Mapping[str, Any]],
    *,
    many: bool = True,
    instead: Mapping[str, Any] | None = None,
) -> str:
    """Lark text (llguidance) of an answer that calls ``tools``, with arguments by their schemas.

    ``many``: one call or more. ``instead``: a JSON schema the answer may follow rather than call.
    """

    def document(schema: Mapping[str, Any], options: Mapping[str, Any] = JSON_OPTIONS) -> str:
        return "%json " + json.dumps({**schema, "x-guidance": options})

    more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if many else ""
    lines = [
        "start: calls" + (" | answer" if instead is not None else ""),
        f"calls: {s.TOOL_CALLS_BEGIN} call{more} {s.TOOL_CALLS_END}",
        f'call: {s.TOOL_CALL_BEGIN} "function" {s.TOOL_SEP} body {s.TOOL_CALL_END}',
        "body: " + " | ".join(f"body_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        function = tool["function"]
        begin = json.dumps(function["name"] + "\n```json\n")
        lines.append(f'body_{number}: {begin} arguments_{number} "\\n```"')
        lines.append(
            f"arguments_{number}: {document(function.get('parameters') or {'type': 'object'}, _ON_A_LINE)}"
        )
    if instead is not None:
        lines.append(f"answer: {document(instead)}")
    return "\n".join(lines) + "\n"
