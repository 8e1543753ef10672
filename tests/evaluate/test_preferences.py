"""Pairs: both forms, tokens, who is held out; accuracy and its standard error."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from dsv3.common.errors import UserError
from dsv3.data import chat
from dsv3.data.tokenizer import Tokenizer, train
from dsv3.evaluate.preferences import (
    accuracy,
    encode_pairs,
    group_of,
    is_held_out,
    padded,
    read_rows,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["some words to learn from, What is 1 + 2? and to say again"] * 9, 340)


def write(path: Path, rows: list[dict]) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


USER = {"role": "user", "content": "What is 1?"}


def test_all_forms_give_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good, bad = ({"role": "assistant", "content": text} for text in ("<think>so</think>one", "two"))
    forms = [
        {"prompt": "What is 1?", "chosen": "<think>so</think>one", "rejected": "two"},
        {"prompt": [USER], "chosen": [good], "rejected": [bad]},
        {"chosen": [USER, good], "rejected": [USER, bad]},
    ]
    rows = read_rows(write(tmp_path / "pairs.jsonl", forms))
    pairs = encode_pairs(tokenizer, rows, 99)
    assert pairs[0].chosen == pairs[1].chosen == pairs[2].chosen
    assert pairs[0].rejected == pairs[1].rejected == pairs[2].rejected
    assert pairs[1].group == pairs[2].group
    assert pairs[0].chosen == chat.encode(tokenizer, [USER, good], keep_think=True)[0]
    assert pairs[0].chosen[-1] == tokenizer.eos_id
    longest = max(len(pairs[0].chosen), len(pairs[0].rejected))
    assert len(encode_pairs(tokenizer, rows, longest)) == 3 and not encode_pairs(tokenizer, rows, longest - 1)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "1: rejected is missing"),
        ({"chosen": "a", "rejected": "b"}, "1: prompt is missing"),
        ({}, "1: chosen is missing"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_rows(write(tmp_path / "pairs.jsonl", [row]))
    with pytest.raises(UserError, match="hold no pairs"):
        read_rows(write(tmp_path / "none.jsonl", []))


def test_a_bad_message_is_named_by_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = read_rows(
        write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": [{"role": "x"}], "rejected": "c"}])
    )
    with pytest.raises(UserError, match=r"p\.jsonl:1: "):
        encode_pairs(tokenizer, rows, 99)


def test_prompts_are_held_out_as_a_whole_and_by_share() -> None:
    groups = [group_of(f"prompt {number}") for number in range(4000)]
    share = sum(is_held_out(group, 0.2) for group in groups) / 4000
    assert abs(share - 0.2) < 4 * math.sqrt(0.16 / 4000)
    assert all(is_held_out(g, 0.3) for g in groups if is_held_out(g, 0.2))  # more are those and others


def test_padding_stands_behind() -> None:
    ids, last = padded([[5, 6, 7], [8]], 2)
    assert ids.tolist() == [[5, 6, 7], [8, 2, 2]] and last.tolist() == [2, 0]


def test_accuracy() -> None:
    found = accuracy([2, 1, 1, None, 3], [1, 2, 1, 0, None], ["a", "b", "c", "d", "e"])
    assert found.value == (1 + 0 + 3 * 0.5) / 5 and found.decided == 2 and found.pairs == 5
    alone = accuracy([1] * 60 + [0] * 40, [0.5] * 100, [str(number) for number in range(100)])
    assert alone.value == 0.6 and alone.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 100))
    together = accuracy([1] * 60 + [0] * 40, [0.5] * 100, [str(number // 10) for number in range(100)])
    assert together.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 10))
    with pytest.raises(UserError, match="no pairs"):
        accuracy([], [], [])


def test_the_standard_error_is_the_spread_over_draws() -> None:
    """Prompts of several pairs, right or wrong together more often than not."""
    draw = random.Random(0)
    values, errors = [], []
    for _ in range(300):
        chosen, groups = [], []
        for prompt in range(60):
            easy = draw.random() < 0.5
            for _ in range(draw.randint(1, 4)):
                chosen.append(1.0 if draw.random() < (0.95 if easy else 0.4) else -1.0)
                groups.append(str(prompt))
        found = accuracy(chosen, [0.0] * len(chosen), groups)
        values.append(found.value)
        errors.append(found.standard_error)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(values), rel=0.15)
