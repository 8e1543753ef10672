"""What training data holds of the questions, planted on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.common.errors import UserError
from dsv3.config.data import DataRecipe
from dsv3.data.prepare import prepare
from dsv3.evaluate.benchmarks.build import build
from dsv3.evaluate.benchmarks.contamination import overlap

LONG = "how many of the seven grey ships that left the harbour on monday came home"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contamination")
    rows = [{"query": f"{LONG.replace('seven', number)}?", "choices": ["one", "two"], "gold": 0}
            for number in ("seven", "nine", "twelve")]  # fmt: skip
    rows.append({"query": "too short to tell", "choices": ["one", "two"], "gold": 1})
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "boolq.jsonl").write_text(
        "".join(json.dumps({**row, "query": f"Nine words that {n} all share with it: {row['query']}"}) + "\n"
                for n, row in enumerate(rows * 3))
    )  # fmt: skip
    return folder


def test_planted_questions_are_found_and_no_others(data: Path, tmp_path: Path) -> None:
    texts = [f"Some words. {LONG.upper()}!  And more words, number {n}." for n in range(3)]
    texts += [f"how many of the nine grey ships that left the harbour, {n} of them" for n in range(40)]
    texts += [f"other text {n} which has nothing in common with any question at all" for n in range(60)]
    (tmp_path / "text").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "text" / f"{n}.txt").write_text(text)
    prepare(
        DataRecipe.model_validate(
            {
                "out": str(tmp_path / "out"),
                "sources": [{"name": "t", "paths": [str(tmp_path / "text")]}],
                "tokenizer": {"vocab_size": 320},
                "valid_fraction": 0.05,
                "workers": 1,
            }
        )
    )
    found = overlap(tmp_path / "out", [build("piqa", data)])["piqa"]
    assert found == {"questions": 4, "searched": 3, "found": 1, "share": 1 / 3, "ids": ["0"]}
    with pytest.raises(UserError, match="no prepared data"):
        overlap(tmp_path, [build("piqa", data)])


def test_examples_in_the_prompt_do_not_count(data: Path) -> None:
    asked = build("boolq", data)
    assert asked.shots == 5
    for question in asked.questions:
        assert question.choices[0][0].count("ships") > question.own.count("ships") <= 1
