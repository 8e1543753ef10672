"""``dsv3 eval`` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3 as package
from dsv3.data.tokenizer import train
from tests.evaluate.benchmarks import package as benchmarks
from tests.model.build import tiny_model

TEXT = "some words to learn from and to say again, and then some more of them; " * 9


def dsv3(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv3", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "model"
    tokenizer = train([TEXT], 330)
    package.save(tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1), folder)
    tokenizer.save(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def test_a_table_and_json(folder: Path) -> None:
    words = ("eval", folder, "--data", folder.parent / "text.txt", "--length", 16, "--sequences", 4)
    done = dsv3(*words, "--quantize", "int8", "--quantize", "int4")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["bits", "per", "byte", "text.txt"]
    assert [row.split()[0] for row in rows] == ["as", "int8", "int4"]
    assert all("%  MTP" in row for row in rows[1:])
    found = json.loads(dsv3(*words, "--json").stdout)
    shown = f"{found['as stored']['text.txt']['bits_per_byte']:.4f}"
    assert shown in rows[0] and len(found["as stored"]["text.txt"]["acceptance"]) == 1


def test_bad_input_is_one_line_and_exit_code_2(folder: Path) -> None:
    for words, said in (
        (("--data", folder.parent / "none.txt"), "none.txt) does not exist"),
        (("--data", folder.parent / "text.txt", "--length", 16, "--quantize", "int2"), "'int2'"),
        ((), "give --data"),
        (("--tasks", "smus"), "did you mean sums"),
    ):
        done = dsv3("eval", folder, *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_tasks_and_their_comparison(folder: Path) -> None:
    data = benchmarks.write(folder.parent / "package")
    words = ("eval", folder, "--data", data, "--tasks", "piqa,sums", "--samples", 3, "--max-tokens", 4)
    done = dsv3(*words)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()[1:]
    assert head.split()[:5] == ["task", "shots", "n", "metric", "score"]
    assert [row.split()[:4] for row in rows[:2]] == [
        ["piqa", "0", "3", "acc_norm"], ["sums", "0", "3", "accuracy"]
    ]  # fmt: skip
    own = folder.with_name("model-eval")
    other = dsv3(*words, "--quantize", "int8", "--out", folder.parent / "int8", "--json")
    assert json.loads(other.stdout)["model"]["quantize"] == "int8"
    done = dsv3("eval", "--compare", own, folder.parent / "int8", "--json")
    assert {row["task"] for row in json.loads(done.stdout)} == {"piqa", "sums"}
    assert (folder.parent / "int8" / "compared-with-model-eval.png").exists()
    refused = dsv3(*words, "--quantize", "int8")
    assert refused.returncode == 2 and "another model or setting" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_list_needs_no_model() -> None:
    found = json.loads(dsv3("eval", "--tasks", "list", "--json").stdout)
    assert "mmlu" in found["benchmarks"] and "sums" in found["generated"]
