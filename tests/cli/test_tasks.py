"""``dsv3 tasks``: examples as a person and as a program reads them."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsv3.cli.main import main


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dsv3", "tasks", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_list_and_show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(monkeypatch, capsys, "list")
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and {"countdown", "instructions", "doctests"} <= set(told)
    assert told["sums"].startswith("Chains of additions")
    code, out, _ = run(monkeypatch, capsys, "show", "sums", "--difficulty", "3", "--count", "2")
    assert code == 0 and out.count("What is") == 2 and out.count("-- score 1\n<think>") == 2
    code, out, _ = run(monkeypatch, capsys, "show", "gcd", "--answer", "\\boxed{0}", "--count", "1", "--json")
    row = json.loads(out)
    assert (
        code == 0 and row["score"] == 0 and row["task"] == "gcd" and row["prompt"].startswith("What is the")
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "sum"), "task (sum) is unknown (did you mean sums?)"),
        (("show", "sums", "--difficulty", "9"), "difficulty (9) of sums must be from 1 to 5"),
        (("show", "sums", "--split", "dev"), "split (dev) must be one of train, validation, test"),
        (("show", "sums", "--index", "-1"), "index (-1) must be 0 or more"),
        (("write", "rows.txt", "--tasks", "sums"), "out (rows.txt) must end in .jsonl"),
        (
            ("write", "nowhere/rows.jsonl", "--tasks", "sums"),
            "out (nowhere/rows.jsonl) must end in .jsonl and",
        ),
        (("write", "rows.jsonl", "--tasks", "sums:x"), "task (sums:x): the difficulty after the colon must"),
        (("write", "rows.jsonl", "--tasks", "sums:9"), "difficulty (9) of sums must be from 1 to 5"),
        (("write", "rows.jsonl", "--tasks", "sums,sum"), "task (sum) is unknown (did you mean sums?)"),
        pytest.param(
            ("write", "rows.jsonl", "--tasks", "gym/propositional_logic"),
            "task (gym/propositional_logic) has no solutions to learn from",
            marks=pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="needs the extra rl"),
        ),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 2 and not out and err.startswith(f"dsv3: {said}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_written_examples_are_different_solved_and_of_their_split(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from dsv3.evaluate.tasks import get
    from dsv3.evaluate.tasks.base import Example, split_of

    out = tmp_path / "rows.jsonl"
    words = ("write", str(out), "--tasks", "sums:1,gcd", "--count", "150")
    code, said, _ = run(monkeypatch, capsys, *words)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    # Difficulty 1 has so many questions, some of them held out: all there are is what is written.
    assert code == 0 and "train examples of sums:1: 149, gcd: 100\n" in said
    assert len({row["id"] for row in rows}) == len(rows) == 249
    for row in rows:
        completion = row.pop("completion")
        example = Example(**row)
        assert "<think>" in completion and get(row["task"]).verify(completion, example) == 1
        assert split_of(row["id"]) == "train"
    run(monkeypatch, capsys, *words, "--split", "test", "--plain")
    held = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert not {row["id"] for row in held} & {row["id"] for row in rows}
    assert all(row["completion"] == f"\\boxed{{{row['answer']}}}" for row in held)
