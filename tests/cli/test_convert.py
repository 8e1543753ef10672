"""``dsv3 convert`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.hf import load, save
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from tests.checkpoint.conftest import SMALL


def dsv3(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv3", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "bf16"
    save(DeepSeekV3(ModelConfig(**SMALL)), path, dtype="bfloat16", max_shard_bytes=20_000)
    return path


def test_to_fp8_and_back(source: Path, tmp_path: Path) -> None:
    done = dsv3("convert", source, tmp_path / "a", "--to", "fp8", "--scale-format", "ue8m0")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert "files; read" in first and 'quantize="fp8"' in last and last.startswith("next: ")
    assert done.stderr.startswith("convert: 100%")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    done = dsv3("convert", tmp_path / "a", tmp_path / "b", "--to", "bf16", "--workers", 3)
    assert done.returncode == 0, done.stderr
    assert "to go back, add --scale-format ue8m0" in done.stdout
    assert f"next: dsv3 generate {tmp_path / 'b'} --prompt" in done.stdout
    assert load(tmp_path / "b").lm_head.weight.dtype == torch.bfloat16


def test_json(source: Path, tmp_path: Path) -> None:
    done = dsv3("convert", source, tmp_path / "a", "--to", "fp8", "--json")
    found = json.loads(done.stdout)
    assert found["folder"] == str(tmp_path / "a") and found["files"] > 3
    moved = found["read_bytes"] + found["written_bytes"]
    assert found["gb_per_second"] == pytest.approx(moved / 1e9 / found["seconds"])


def test_bad_input_is_one_line_and_exit_code_2(source: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((source, tmp_path / "a", "--to", "fp9"), "--to (fp9) is unknown (did you mean fp8?)"),
        ((source, tmp_path, "--to", "fp8"), "already exists"),
        ((tmp_path / "nothing", tmp_path / "a", "--to", "fp8"), "is not a folder"),
        ((source, tmp_path / "a", "--to", "bf16"), "is in bf16 already"),
    ):
        done = dsv3("convert", *arguments)
        assert done.returncode == 2
        assert said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert not list(tmp_path.iterdir())
