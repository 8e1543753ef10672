from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import special as s
from dsv3.data.chat import render
from dsv3.serve.api.tools import Arguments, Call, Content, Part, ToolParser, grammar
from tests.serve.api.test_markers import cuts

CONTROL = [
    s.TOOL_CALLS_BEGIN,
    s.TOOL_CALL_BEGIN,
    s.TOOL_SEP,
    s.TOOL_CALL_END,
    s.TOOL_CALLS_END,
    s.USER,
    s.EOS,
]
mess = st.lists(
    st.sampled_from(
        [
            *CONTROL,
            "<｜tool▁",
            "｜>",
            "function",
            "get_weather",
            "\n",
            "```json",
            "```",
            "`",
            '{"a": 1}',
            " ",
            "x",
            "é",
        ]
    ),
    max_size=30,
).map("".join)


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str, str]]]:
    """The content, and the calls: id, name, arguments."""
    numbers = itertools.count()
    parser = ToolParser(lambda: f"call_{next(numbers)}")
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.feed(piece)
    parts += parser.close()
    content, calls = "", []
    for part in parts:
        if isinstance(part, Content):
            content += part.text
        elif isinstance(part, Call):
            assert part.index == len(calls)
            calls.append([part.id, part.name, ""])
        else:
            assert isinstance(part, Arguments) and part.index == len(calls) - 1
            calls[-1][2] += part.text
    assert parser.calls == len(calls)
    return content, [(a, b, c) for a, b, c in calls]


@given(st.data(), mess)
def test_whatever_the_model_writes_is_read_alike_however_it_is_cut(data: st.DataObject, text: str) -> None:
    whole = read([text])
    assert read(cuts(data, text)) == whole
    assert read(list(text)) == whole
    shown = whole[0] + "".join(name + arguments for _, name, arguments in whole[1])
    assert not any(marker in shown for marker in CONTROL)


names = st.sampled_from(["f", "get_weather", "a.b-c"])
values = st.dictionaries(st.text(max_size=4), st.text(max_size=12) | st.integers() | st.none(), max_size=3)


@given(st.data(), st.text("ab \n{`é", max_size=20), st.lists(st.tuples(names, values), max_size=3))
def test_what_the_template_writes_is_read_back(
    data: st.DataObject, content: str, wanted: list[tuple[str, dict[str, object]]]
) -> None:
    calls = [{"function": {"name": name, "arguments": json.dumps(value)}} for name, value in wanted]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": content, "tool_calls": calls},
    ]
    rendered = render(messages)
    text = rendered.text[slice(*rendered.spans[0])].removesuffix(s.EOS)
    said, found = read(cuts(data, text))
    assert said == content
    assert [(name, json.loads(arguments)) for _, name, arguments in found] == wanted


BEGIN = f"{s.TOOL_CALLS_BEGIN}{s.TOOL_CALL_BEGIN}function{s.TOOL_SEP}"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (BEGIN + 'f\n```json\n{"a": ', "", [("f", '{"a":')]),  # cut off: what there is
        (BEGIN + "f\n```json\n", "", [("f", "{}")]),
        (BEGIN + 'f\n{"a": 1}', "", [("f", '{"a": 1}')]),  # no fence
        (BEGIN + "not a name\n```json\n{}", "not a name\n```json\n{}", []),
        (BEGIN + "f", "f", []),  # it never came to a call
        (s.TOOL_CALLS_BEGIN + "well", "well", []),
        (f"a{s.USER}b", "ab", []),
        (BEGIN + f'f\n```json\n{{"a": 1}}\n```{s.TOOL_CALLS_END} bye ', " bye ", [("f", '{"a": 1}')]),
        (
            BEGIN + f"f\n```json\n{{}}\n```{s.TOOL_CALL_BEGIN}x{s.TOOL_SEP}g\n```json\n{{}}",
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        (BEGIN + "x" * 5000 + "\n```json\n{}", "x" * 5000 + "\n```json\n{}", []),
        (BEGIN + "f\n" + " " * 5000 + "{}", "f\n" + " " * 5000 + "{}", []),
    ],
)
def test_malformed_calls_end_cleanly(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    said, found = read([text])
    assert (said, [(name, arguments) for _, name, arguments in found]) == (content, calls)
    assert read(list(text)) == (said, found)


def test_a_long_answer_is_read_in_linear_time() -> None:
    text = BEGIN + "f\n```json\n" + " \n" * 20_000 + "{}" + "\n```" + s.TOOL_CALL_END
    assert read([text])[1][0][2].strip() == "{}"


def test_a_grammar_names_the_template_and_cannot_be_broken_out_of() -> None:
    hostile = {"type": "object", "description": '"\nstart: "x', "x-guidance": {"lenient": True}}
    tools = [{"function": {"name": "f", "parameters": hostile}}, {"function": {"name": "g"}}]
    lines = grammar(tools, many=False).splitlines()
    assert [re.match(r"[a-z_0-9]+:", line) is not None for line in lines] == [True] * len(lines)
    assert sum(line.startswith("start:") for line in lines) == 1
    assert '"lenient": false' in next(line for line in lines if line.startswith("arguments_0"))
