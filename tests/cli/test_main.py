"""The command line as a whole: one line for what it does not take, whole sentences in its help."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import dsv3
from dsv3.cli import main as command


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    monkeypatch.setattr(sys, "argv", ["dsv3", *words])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        command.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


@pytest.mark.parametrize(
    "words, line",
    [
        ("generate", "Missing argument 'folder'. (see dsv3 generate --help)"),
        (
            "generate x --prompt hi --max-tokens -3",
            "--max-tokens (-3): Input should be greater than or equal to 1 (see dsv3 generate --help)",
        ),
        (
            "generate x --prompt hi --max-tokens=-3",
            "--max-tokens (-3): Input should be greater than or equal to 1 (see dsv3 generate --help)",
        ),
        (
            "generate x --promt hi",
            "No such option: --promt (Possible options: --prompt) (see dsv3 generate --help)",
        ),
        ("pretrian", "No such command 'pretrian'. Did you mean 'pretrain'? (see dsv3 --help)"),
        ("data fetch x", "Missing option '--to'. (see dsv3 data fetch --help)"),
    ],
)
def test_words_that_no_verb_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, line: str
) -> None:
    assert said(capsys, monkeypatch, *words.split()) == (2, f"dsv3: {line}\n")


@pytest.mark.parametrize("words", [[], ["--help"], ["plan", "--help"]])
def test_help_cuts_no_sentence_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    code, text = said(capsys, monkeypatch, *words)
    assert code == (0 if words else 2) and "Usage: dsv3" in text and "Commands:" in text
    assert "..." not in text.partition("Commands:")[2]


@pytest.mark.parametrize("make", [torch.empty, numpy.empty])
def test_out_of_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, make: object
) -> None:
    monkeypatch.setattr(command, "app", lambda **_: make(10**17))  # type: ignore[operator]
    code, text = said(capsys, monkeypatch)
    assert code == 1 and text.startswith("dsv3: out of memory (") and text.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["tasks", "write", "{}/file/tasks.jsonl", "--tasks", "sorting", "--count", "2"],
        ["plan", "pipeline", "--out", "{}/file/p.png"],
    ],
)
def test_a_path_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, text = said(capsys, monkeypatch, *(word.format(tmp_path) for word in words))
    assert code in (1, 2) and text.startswith("dsv3: ") and f"{tmp_path}/file" in text
    assert text.count("\n") == 1


def test_other_failures_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("a bug, with memory in its name")

    monkeypatch.setattr(command, "app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        command.main()


@pytest.mark.parametrize("verb", ["pretrain", "extend", "sft", "distill", "reward", "grpo"])
def test_a_recipes_mistake_is_told_at_once(verb: str) -> None:
    """Importing torch takes seconds: a recipe is read first."""
    told = (
        "import sys; from dsv3.cli.main import run; from dsv3.common.errors import UserError\n"
        f"sys.argv = ['dsv3', '{verb}', 'none.yaml']\n"
        "try: run()\n"
        "except UserError as error: print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert done.stdout.startswith("recipe none.yaml does not exist") and done.stdout.endswith("False\n")


def test_the_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(capsys, monkeypatch, "--version") == (0, f"dsv3 {dsv3.__version__}\n")


@pytest.mark.parametrize(
    "rank, lines", [(None, ["chosen", "slower"]), ("0", ["chosen", "slower"]), ("1", ["slower"])]
)
def test_the_houses_log_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str | None, lines: list[str]
) -> None:
    """Which kernels are used is said once, not by every process; what is amiss by each."""

    def verb(**_: object) -> None:
        logging.getLogger("dsv3").info("%s", "chosen")
        logging.getLogger("dsv3").debug("as it should be")
        logging.getLogger("dsv3").warning("slower")

    monkeypatch.setattr(command, "app", verb)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        command.main()
    assert capsys.readouterr().err.splitlines() == lines
