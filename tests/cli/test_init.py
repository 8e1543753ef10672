"""``dsv3 init`` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from dsv3.checkpoint.hf import load
from dsv3.data.tokenizer import train
from dsv3.ops.integers import Int4


def dsv3(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv3", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_preset_changed_and_written_quantised(tmp_path: Path) -> None:
    train(["some words to learn from"] * 9, 330).save(tmp_path / "tokenizer")
    changes = ("--num_hidden_layers", 2, "--vocab-size=400", "--rope_scaling.factor", 4)
    words = ("--to", "int4", "--group", 32, "--seed", 3, "--tokenizer", tmp_path / "tokenizer")
    done = dsv3("init", "tiny", tmp_path / "a", *words, *changes)
    assert done.returncode == 0, done.stderr
    assert "parameters in int4; wrote" in done.stdout and f"next: dsv3 chat {tmp_path / 'a'}" in done.stdout
    assert "init: 100%" in done.stderr
    model = load(tmp_path / "a")
    config = model.config
    assert (config.num_hidden_layers, config.vocab_size, config.hidden_size) == (2, 400, 192)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 4
    weight = model.model.layers[1].mlp.experts.packed[0]
    assert isinstance(weight, Int4) and weight.group == 32
    # From a folder's configuration, and as JSON.
    done = dsv3("init", tmp_path / "a", tmp_path / "b", "--json", "--num_hidden_layers", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] > 0
    assert load(tmp_path / "b").config.num_hidden_layers == 1


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    train(["some words to learn from"] * 9, 330).save(tmp_path / "tokenizer")
    before = sorted(tmp_path.iterdir())
    for words, said in (
        (("tinny", tmp_path / "a"), "neither a preset (did you mean tiny?)"),
        (("tiny", tmp_path / "a", "--to", "int3"), "--to (int3) is unknown"),
        (("tiny", tmp_path / "a", "--hidden_sise", 64), "unknown key hidden_sise"),
        (("tiny", tmp_path / "a", "--hidden_size", "wide"), "hidden_size ('wide')"),
        (
            ("tiny", tmp_path / "a", "--vocab_size", 64, "--tokenizer", tmp_path / "tokenizer"),
            "vocab_size (64)",
        ),
        (("tiny", tmp_path), "already exists"),
    ):
        done = dsv3("init", *words)
        assert done.returncode == 2, done.stdout
        assert said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before
