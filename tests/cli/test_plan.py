"""``dsv3 plan params`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.model.build import tiny_config


def dsv3(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dsv3", *arguments], capture_output=True, text=True)


def test_json_of_the_released_model() -> None:
    started = time.monotonic()
    done = dsv3("plan", "params", "v3-671b", "--json")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30  # 3 seconds on an idle machine
    found = json.loads(done.stdout)
    assert found["model"] == "v3-671b"
    assert found["parameters_main"] == 671_026_404_352
    assert found["kv_bytes_per_token"] == 70_272
    assert found["seq_len_tokens"] == 4096


def test_table_when_piped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_nextn_predict_layers=1).to_dict()))
    done = dsv3("plan", "params", str(tmp_path), "--seq-len", "128")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()  # no box drawing
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert {"embedding", "routed experts", "main model", "MTP"} <= set(rows)
    assert "92,160" in rows["routed experts"]  # 2 layers, 16 experts, 3 matrices of 40 x 24
    assert "sequences of 128" in done.stdout


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config().to_dict(), "n_group": 3}))
    for arguments, said in (
        (("smal",), "did you mean small"),
        ((str(tmp_path / "nothing"),), "neither a preset"),
        ((str(tmp_path),), "n_group (3) must divide n_routed_experts (16)"),
    ):
        done = dsv3("plan", "params", *arguments)
        assert done.returncode == 2
        assert said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert dsv3("plan", "params", "tiny", "--seq-len", "0").returncode == 2
