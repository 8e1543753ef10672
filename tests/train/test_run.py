"""A run's folder: one process writes it at a time; going back to a checkpoint drops the lines after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.train.run import RunFolder, read_lines

RECIPE = ModelConfig.preset("tiny")
WRITE = """
import sys
from dsv3.config.model import ModelConfig
from dsv3.train.run import RunFolder
RunFolder(sys.argv[1]).begin(ModelConfig.preset("tiny"), resume=True)
print("writing", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_writes_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "writing\n"
        before = (tmp_path / "recipe.yaml").stat().st_mtime_ns
        with pytest.raises(UserError, match=rf"out \({tmp_path}\) is written by another process now"):
            RunFolder(tmp_path).begin(RECIPE, resume=True)
        assert (tmp_path / "recipe.yaml").stat().st_mtime_ns == before
        RunFolder(tmp_path, writes=False).begin(RECIPE, resume=True)  # another rank of the same run
        other.kill()
    RunFolder(tmp_path).begin(RECIPE, resume=True)
    RunFolder(tmp_path).begin(RECIPE, resume=True)  # a run after another in one process


def test_going_back_drops_what_came_after(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in range(1, 6):
        run.metric({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    run.rewind(3)
    run.metric({"step": 4})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 4}
