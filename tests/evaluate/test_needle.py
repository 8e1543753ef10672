"""Needle in a haystack: prompts are what they say, answers are judged to the digit, a kill loses little."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dsv3
from dsv3.common.errors import UserError
from dsv3.config.data import DataRecipe, NeedlesConfig
from dsv3.config.recipe import validate
from dsv3.data.needles import KEYS, VALUES, needle, question, strew
from dsv3.data.prepare import prepare
from dsv3.data.tokenizer import Tokenizer, train
from dsv3.evaluate import needle as needles
from dsv3.evaluate.needle import Grid, Haystack, is_right, measure, scores, trials
from dsv3.evaluate.needle_plot import draw
from tests.model.build import tiny_model

TEXT = "And it was so. The evening came; then the morning! Was it day? It was, and the second day came. " * 9
GRID = Grid((128, 160), (0.0, 0.5, 1.0), samples=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer that knows some of the needles' words."""
    folder = tmp_path_factory.mktemp("niah") / "model"
    tokenizer = train([strew(TEXT, NeedlesConfig(every=60), random.Random(0))], 400)
    dsv3.save(tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=80), folder)
    tokenizer.save(folder)
    (folder.parent / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def haystack(folder: Path) -> Haystack:
    return Haystack(TEXT, Tokenizer.load(folder), "text.txt")


class Oracle:
    """Stands where the engine does and reads the prompt; wrong beyond ``reach`` tokens."""

    def __init__(self, tokenizer: Tokenizer, reach: int):
        self.tokenizer, self.reach, self.asked = tokenizer, reach, 0

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        self.asked += len(prompts)
        return [SimpleNamespace(text=self.answer(prompt)) for prompt in prompts]

    def answer(self, prompt: list[int]) -> str:
        text = self.tokenizer.decode(prompt[-self.reach :])
        key = text.rpartition("Recall: ")[2]
        return text.partition(f"Remember: {key}")[2][:4] or "0."


def test_a_prompt_is_as_long_as_said_and_hides_one_needle_at_its_depth(haystack: Haystack) -> None:
    decode = haystack.tokenizer.decode
    for length in (128, 300, 1000):  # the text comes again where it is too short
        found = trials(haystack, Grid((length,), (0.0, 0.25, 0.5, 1.0)), length, sample=1)
        assert [trial.depth for trial in found] == [1.0, 0.5, 0.25, 0.0]
        for trial in found:
            text = decode(trial.prompt)
            line = needle(trial.key, trial.value)
            assert len(trial.prompt) == length
            assert text.endswith(" " + question(trial.key))
            assert text.count(line) == 1
            assert text.count("Remember:") == 4
            front = text.partition(" " + line)[0]
            before = len(haystack.tokenizer.encode(front)) / length
            assert trial.depth - 0.05 - 40 / length < before <= trial.depth
            assert not front or front[-1] in ".!?:;"


def test_no_distractor_has_the_key_or_the_value_asked_for(haystack: Haystack) -> None:
    """With few values, copying any needle's would be right too often otherwise."""
    few = Haystack(TEXT, haystack.tokenizer, "text.txt", KEYS[:4], range(10, 14))
    decode, keys, values = haystack.tokenizer.decode, set(), set()
    for sample in range(20):
        for trial in trials(few, GRID, 160, sample):
            told = re.findall(r"Remember: ([a-z]+)(\d+) \1\2\.", decode(trial.prompt))
            assert len(told) == 4 and {key for key, _ in told} == set(KEYS[:4])
            assert [key for key, value in told if int(value) == trial.value] == [trial.key]
            assert {int(value) for _, value in told} <= {10, 11, 12, 13}
            keys.add(trial.key)
            values.add(trial.value)
    assert (keys, values) == (set(KEYS[:4]), {10, 11, 12, 13})


def test_prepared_data_is_asked_for_what_it_teaches(haystack: Haystack, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT * 8, encoding="utf-8")
    source = {"name": "book", "paths": [str(tmp_path / "book.txt")], "max_document_chars": 256}
    needles = {"shortest": 60, "longest": 90, "keys": 5, "values": 7}
    tree = {
        "out": str(tmp_path / "data"),
        "sources": [source, {**source, "name": "with", "needles": needles}],
        "tokenizer": {"vocab_size": 300},
        "valid_fraction": 0.3,
        "workers": 1,
    }
    prepare(validate(DataRecipe, tree))
    opened = Haystack.open(tmp_path / "data", haystack.tokenizer)
    assert (opened.name, opened.keys, opened.values) == ("data/book", KEYS[:5], range(10, 17))
    plain = Haystack.open(tmp_path / "book.txt", haystack.tokenizer)
    assert (plain.keys, plain.values) == (KEYS, VALUES)


def test_trials_do_not_depend_on_which_depths_are_asked(haystack: Haystack) -> None:
    many = trials(haystack, Grid((100,), (0.0, 0.5, 1.0)), 100, 3)
    assert trials(haystack, Grid((100,), (0.5,)), 100, 3) == [many[1]]
    assert len({trial.value for s in range(4) for trial in trials(haystack, GRID, 100, s)}) > 6


def test_deeper_needles_come_first_and_share_their_text(haystack: Haystack) -> None:
    deep, middle, front = trials(haystack, Grid((400,), (0.0, 0.5, 1.0)), 400, 0)
    shared = next(i for i, (a, b) in enumerate(zip(deep.prompt, middle.prompt)) if a != b)
    assert 150 < shared <= 200
    assert deep.prompt[:50] != front.prompt[:50]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("123.", True),
        (" 123", True),
        ("1234", False),
        ("12", False),
        ("a 123", False),
        ("", False),
        ("0123", True),
    ],
)
def test_only_the_whole_number_is_right(answer: str, right: bool) -> None:
    assert is_right(answer, 123) is right


def test_the_score_says_where_needles_were_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Oracle(Tokenizer.load(folder), reach=132)
    monkeypatch.setattr(needles, "_llm", lambda *_, **__: oracle)
    result = measure(folder, folder.parent / "text.txt", GRID, tmp_path / "a.json")
    lengths, depths, share = scores(result)
    assert (lengths, depths) == ([128, 160], [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(share, [[1, 0], [1, 1], [1, 1]])
    assert oracle.asked == 12
    wider = Grid((128, 160, 144), GRID.depths, samples=2)  # what is there is not asked again
    measure(folder, folder.parent / "text.txt", wider, tmp_path / "a.json")
    assert oracle.asked == 18
    draw([("one", result), ("two", result)], tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_engine_answers_beyond_the_models_length_and_shares_prefixes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    build = needles._llm
    monkeypatch.setattr(needles, "_llm", lambda *a, **o: made.append(build(*a, **o)) or made[0])
    result = measure(
        folder, folder.parent / "text.txt", Grid((600,), (0.0, 0.5, 1.0), 1), tmp_path / "a.json"
    )
    assert len(result["cells"]) == 3 and scores(result)[2].shape == (3, 1)
    assert json.loads((tmp_path / "a.json").read_text()) == result
    assert made[0].engine.stats.cached_tokens > 250  # half of the second prompt at least


def test_a_prompt_may_fill_the_models_length(folder: Path, tmp_path: Path) -> None:
    model = dsv3.load(folder)
    model.config = model.config.model_copy(update={"max_position_embeddings": 300})
    dsv3.save(model, tmp_path / "model", tokenizer_files=[folder / "tokenizer.json"])
    result = measure(
        tmp_path / "model", folder.parent / "text.txt", Grid((300,), (0.5,), 1), tmp_path / "a.json"
    )
    assert len(result["cells"]) == 1


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answers = out / f"{folder.parent.name}-model.json"
    words = [
        "niah", folder, "--haystack", folder.parent / "text.txt", "--lengths", "160,200", "--depths", 3,
        "--out", out,
    ]  # fmt: skip
    command = [sys.executable, "-m", "dsv3", *map(str, words), "--samples", "200"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not answers.exists() and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = json.loads(answers.read_text())["cells"]
    assert 0 < len(before) < 200 * 2 * 3
    again = subprocess.run([*command[:-1], "3", "--json"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    after = json.loads(answers.read_text())["cells"]
    assert after[: len(before)] == before
    assert {(c["length"], c["sample"]) for c in after} >= {(n, s) for n in (160, 200) for s in range(3)}
    assert (out / "heat_map.png").is_file()
    assert json.loads(again.stdout)[answers.stem]["lengths"] == [160, 200]


def test_bad_input_is_refused(folder: Path, haystack: Haystack, tmp_path: Path) -> None:
    text = folder.parent / "text.txt"
    for grid, said in (
        (lambda: Grid((), (0.5,)), "lengths"),
        (lambda: Grid((128,), (1.5,)), "depths"),
        (lambda: trials(haystack, Grid((128,), (0.5,), distractors=90), 128, 0), "from 0 to 89"),
        (lambda: trials(haystack, Grid((128,), (0.5,), distractors=-1), 128, 0), "distractors"),
    ):
        with pytest.raises(UserError, match=said):
            grid()
    with pytest.raises(UserError, match=r"lengths \(20\) leave no room"):
        measure(folder, text, Grid((20,), (0.5,)), tmp_path / "a.json")
    with pytest.raises(UserError, match="no text in UTF-8"):
        measure(folder, folder.parent / "none.txt", GRID, tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"format": "dsv3-needle/1", "seed": 7, "cells": []}')
    with pytest.raises(UserError, match="choose another --out"):
        measure(folder, text, GRID, tmp_path / "b.json")
    assert not (tmp_path / "a.json").exists()
