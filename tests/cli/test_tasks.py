"""``dsv3 tasks``: examples as a person and as a program reads them."""

from __future__ import annotations

import json
import sys

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
    assert code == 0 and {"sums", "countdown", "instructions", "doctests"} <= set(out.split())
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
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 2 and not out and err.startswith(f"dsv3: {said}") and err.count("\n") == 1
