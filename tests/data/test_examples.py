from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.data import chat, rows
from dsv3.data.examples import CHUNK, Examples, encode, gather, pieces, spans
from dsv3.data.rows import Row
from dsv3.data.tokenizer import Tokenizer

BOS, EOS, USER, ASSISTANT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
THOUGHT = "<think>\n2 and 2\n</think>\n\n4"


def shown(tokenizer: Tokenizer, fields: dict[str, Any], **options: Any) -> list[tuple[str, bool]]:
    """One row as text, in runs that bear loss or do not."""
    found = gather([Row(fields, "x:1")], tokenizer, 4096, **options)
    return spans(tokenizer, *found.example(0))


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_only_answers_bear_loss_in_every_turn(tokenizer: Tokenizer) -> None:
    turns = [say("user", "q"), say("assistant", "a"), say("user", "more"), say("assistant", "b")]
    assert shown(tokenizer, {"messages": [say("system", "S"), *turns]}) == [
        (f"{BOS}S{USER}q{ASSISTANT}", False),
        (f"a{EOS}", True),
        (f"{USER}more{ASSISTANT}", False),
        (f"b{EOS}", True),
    ]


def test_prompt_and_completion_as_texts_and_as_messages(tokenizer: Tokenizer) -> None:
    wanted = [(f"{BOS}{USER}q{ASSISTANT}", False), (f"a{EOS}", True)]
    assert shown(tokenizer, {"prompt": "q", "completion": "a", "task": "sums"}) == wanted
    both = {"prompt": [say("user", "q")], "completion": [say("assistant", "a")]}
    assert shown(tokenizer, both) == wanted
    # What the assistant said in the prompt is context, and so are a tool's words in the completion.
    asked = [say("user", "q"), say("assistant", "a"), say("user", "more")]
    said = [say("assistant", "b"), say("tool", "t"), say("assistant", "c")]
    assert shown(tokenizer, {"prompt": asked, "completion": said}) == [
        (f"{BOS}{USER}q{ASSISTANT}a{EOS}{USER}more{ASSISTANT}", False),
        (f"b{EOS}", True),
        (
            "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>t<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
            False,
        ),
        (f"c{EOS}", True),
    ]


def test_text_bears_loss_but_for_its_beginning(tokenizer: Tokenizer) -> None:
    assert shown(tokenizer, {"text": "some <｜User｜> text"}) == [
        (BOS, False),
        (f"some <｜User｜> text{EOS}", True),
    ]


def test_the_released_template_drops_reasoning_and_ours_keeps_it(tokenizer: Tokenizer) -> None:
    jinja2 = pytest.importorskip("jinja2")
    # What the released tokenizer_config.json does with an answer.
    released = jinja2.Template(
        "{{ content.split('</think>')[-1] if '</think>' in content else content }}<｜end▁of▁sentence｜>"
    )
    row = {"messages": [say("user", "2+2?"), say("assistant", THOUGHT)]}
    assert released.render(content=THOUGHT) == f"\n\n4{EOS}"
    assert shown(tokenizer, row, keep_think=False)[-1] == (f"\n\n4{EOS}", True)
    assert shown(tokenizer, row)[-1] == (THOUGHT + EOS, True)
    found = gather([Row(row, "x")], tokenizer, 100)
    assert {tokenizer.special("think"), tokenizer.special("end_think")} < set(found.ids.tolist())


def test_reasoning_apart_is_put_into_the_answer(tokenizer: Tokenizer) -> None:
    apart = say("assistant", "4", reasoning_content="2 and 2")
    asked = say("user", "2+2?", reasoning_content=None)  # a parquet file gives every message every field
    assert shown(tokenizer, {"messages": [asked, apart]})[-1] == (THOUGHT + EOS, True)
    assert shown(tokenizer, {"prompt": "2+2?", "completion": [apart]})[-1] == (THOUGHT + EOS, True)
    with pytest.raises(UserError, match=r"x:1: messages\[0\].reasoning_content must be .* the assistant's"):
        shown(tokenizer, {"messages": [say("user", "q", reasoning_content="hm"), apart]})


def test_tools_are_told_and_calls_bear_loss(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "messages": [say("user", "q"), {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"function": {"name": "f", "description": "Does f."}}],
    }
    (asked, _), (called, bears) = shown(tokenizer, row)
    assert "### f\nDescription: Does f." in asked
    assert "<｜tool▁sep｜>f" in called and bears


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the row has no column; it needs messages, prompt and completion, or text"),
        ({"question": "q", "answer": "a"}, "the row has question, answer; it needs messages"),
        ({"text": ""}, r"text \(''\) must be a string that is not empty"),
        ({"text": 3}, "text .3. must be a string"),
        ({"messages": []}, "messages .* must be a list of messages that is not empty"),
        ({"messages": "hi"}, "messages .'hi'. must be a list"),
        ({"messages": ["hi"]}, "messages .* must be a list"),
        ({"messages": [say("user", "q")]}, "messages holds no message of the assistant"),
        ({"messages": [say("robot", "q"), say("assistant", "a")]}, r"messages\[0\].role .'robot'."),
        ({"messages": [say("user", 3), say("assistant", "a")]}, r"messages\[0\].content .3. must be"),
        ({"prompt": "q"}, "completion is missing: prompt and completion go together"),
        ({"prompt": None, "completion": "a"}, "prompt is missing"),
        ({"prompt": "q", "completion": 3}, "completion .3. must be a text or a list of messages"),
        ({"prompt": "q", "completion": [say("user", "a")]}, "completion must begin with a message of the as"),
        ({"prompt": "q", "completion": "a", "tools": ["f"]}, r"tools\[0\]"),
    ],
)
def test_a_bad_example_is_refused_with_file_and_line(
    tokenizer: Tokenizer, fields: dict, message: str, tmp_path: Path
) -> None:
    good = {"text": "good"}
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, good, fields, good]))
    with pytest.raises(UserError, match=message) as caught:
        gather(rows.read([str(path)]), tokenizer, 64)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_long_examples_are_cut_dropped_or_refused_and_counted(tokenizer: Tokenizer) -> None:
    data = [
        Row({"prompt": "q", "completion": "a"}, "f:1"),
        Row({"prompt": "q", "completion": "word " * 50}, "f:2"),
        Row({"prompt": "word " * 50, "completion": "a"}, "f:3"),  # what bears loss lies behind the cut
    ]
    short, long, _ = [len(ids) for ids, _ in encode(tokenizer, [pieces(row.fields) for row in data])]
    cut = gather(data, tokenizer, 20, long="cut")
    assert (cut.read, cut.cut, cut.dropped, cut.lengths.tolist()) == (3, 1, 1, [short, 20])
    dropped = gather(data, tokenizer, 20, long="drop")
    assert (dropped.read, dropped.cut, dropped.dropped, dropped.lengths.tolist()) == (3, 0, 2, [short])
    with pytest.raises(UserError, match=rf"^f:2 has {long} tokens, more than sequence_length \(20\)"):
        gather(data, tokenizer, 20, long="refuse")
    assert gather(data[:2], tokenizer, long, long="refuse").lengths.tolist() == [short, long]
    with pytest.raises(UserError, match="no example: all 1 rows were dropped"):
        gather(data[1:2], tokenizer, 20, long="drop")
    with pytest.raises(UserError, match="no example: there is no row"):
        gather([], tokenizer, 20)


def test_many_rows_are_the_rows_one_by_one(tokenizer: Tokenizer) -> None:
    data = [Row({"prompt": f"{i} + {i}?", "completion": f"it is {2 * i}"}, "x") for i in range(CHUNK + 9)]
    found = gather(data, tokenizer, 64)
    assert len(found) == len(data)
    for number, row in enumerate(data):
        messages = [say("user", row.fields["prompt"]), say("assistant", row.fields["completion"])]
        ids, answer = chat.encode(tokenizer, messages)
        ours = found.example(number)
        assert (ours[0].tolist(), ours[1].tolist()) == (ids, answer)


lists = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=40)


def examples(content: list[list[int]]) -> Examples:
    starts = np.cumsum([0, *map(len, content)])
    ids = np.array([token for one in content for token in one], dtype=np.uint32)
    return Examples(ids, ids % 2 == 1, starts, len(content))


@given(content=lists, fraction=st.floats(0, 1))
def test_a_split_parts_by_content(content: list[list[int]], fraction: float) -> None:
    train, held = examples(content).split(fraction)
    parts = [[tuple(part.example(i)[0].tolist()) for i in range(len(part))] for part in (train, held)]
    assert sorted(parts[0] + parts[1]) == sorted(map(tuple, content))
    assert not set(parts[0]) & set(parts[1])
    for part in (train, held):
        for number in range(len(part)):
            ids, bears = part.example(number)
            assert (bears == (ids % 2 == 1)).all()


def test_the_split_keeps_its_share_and_the_fingerprint_sees_every_change() -> None:
    many = examples([[i, i + 1] for i in range(4000)])
    assert 300 < len(many.split(0.1)[1]) < 500
    other = examples([[i, i + 1] for i in range(4000)])
    assert many.fingerprint() == other.fingerprint() < 2**63
    other.bears[7] ^= True
    assert many.fingerprint() != other.fingerprint()
