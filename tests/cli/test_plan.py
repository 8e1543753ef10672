"""``dsv3 plan`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dsv3.cli import plan
from dsv3.common.errors import UserError
from tests.model.build import tiny_config


def dsv3(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dsv3", *arguments], capture_output=True, text=True)


def test_json_of_the_released_model() -> None:
    before = os.times()
    done = dsv3("plan", "params", "v3-671b", "--json")
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert sum(after[2:4]) - sum(before[2:4]) < 15  # of the processor; it takes 3
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


def in_process(*arguments: str) -> Result:
    """The verb without a process of its own; a user's mistake stays an exception."""
    return CliRunner().invoke(plan.app, list(arguments))


def test_cost_of_the_reports_run() -> None:
    done = in_process("cost", "--json", "--check")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["gpu_hours_per_trillion_tokens"] == pytest.approx(180_000, rel=1e-6)
    assert found["cost_usd"] == pytest.approx(2 * 2_664_000, rel=1e-6)
    assert sum(found["train_flops_per_token_by_part"].values()) == found["train_flops_per_token"]
    assert sum(found["time_us_per_token_gpu"].values()) == pytest.approx(1e6 / found["tokens_per_s_gpu"])
    assert 0.8 < found["fp8_flops_share"] < 0.85
    assert len(found["report"]) == 7 and len(found["held_out"]) == 6 and len(found["sensitivity"]) == 11


def test_cost_of_a_recipe_is_that_of_the_preset() -> None:
    root = Path(__file__).parents[2]
    recipe = in_process("cost", str(root / "recipes/pretrain-v3-671b.yaml"), "--json")
    preset = in_process("cost", "--json")
    assert recipe.exit_code == 0, recipe.output
    ours, theirs = json.loads(recipe.stdout), json.loads(preset.stdout)
    assert {**ours, "model": ""} == {**theirs, "model": ""}


def test_cost_of_other_runs() -> None:
    small = json.loads(
        in_process(
            "cost", "--preset", "tiny", "--gpus", "1", "--pipeline", "1", "--expert", "1",
            "--hardware", "h100",
            "--tokens", "1e6", "--seq-len", "512", "--batch", "8", "--precision", "bf16", "--usd-hour", "4",
            "--efficiency", "0.2", "--json",
        ).stdout
    )  # fmt: skip
    assert small["fp8_flops_share"] == 0 and small["time_us_per_token_gpu"]["pipeline bubble"] == 0
    assert small["cost_usd"] == pytest.approx(4 * small["gpu_hours"])
    assert small["efficiency"] == 0.2 and small["mfu_of_bf16_peak"] < 0.2
    done = in_process("cost", "--gpus", "1024", "--hardware", "b200", "--schedule", "interleaved", "--check")
    assert done.exit_code == 0 and "fitted to the report's run" in done.stdout and done.stdout.isascii()
    assert "Held out" in done.stdout and "Sensitivity" in done.stdout


def test_memory_served_and_trained() -> None:
    found = json.loads(in_process("memory", "--json").stdout)
    assert found["formats"]["fp8"]["machines_needed"]["h200"] == 6
    assert found["formats"]["int4"]["weight_bytes"] == pytest.approx(379.8e9, rel=1e-3)
    shown = in_process("memory", "tiny", "--context", "512", "--cache", "fp8").stdout
    assert "weights without MTP" in shown and "1 x 512 tokens" in shown
    training = json.loads(in_process("memory", "--train", "--json").stdout)
    assert training["holds"] is True
    assert training["bytes_per_gpu"] == pytest.approx(sum(training["bytes_per_gpu_by_part"].values()))
    assert "does not hold it" in in_process("memory", "--train", "--precision", "bf16").stdout


def test_serve_beside_the_published_day() -> None:
    found = json.loads(in_process("serve", "--json").stdout)
    assert found["published"][0]["published_tokens_per_s_node"] == 73_700
    assert found["prefill"]["nodes"] > 0 and found["decode"]["sequences_per_gpu"] > 100
    shown = in_process("serve", "--mtp", "--batch", "64").stdout
    assert "64 sequences a GPU" in shown and "published 226.75" in shown


def test_pipeline_drawn_and_in_numbers(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    arguments = ("pipeline", "--ranks", "4", "--micro-batches", "8", "--schedule", "1f1b,dualpipe")
    done = in_process(*arguments, "--out", str(picture))
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in done.stdout
    found = json.loads(in_process(*arguments, "--json").stdout)
    assert [row["time_bubble"] for row in found["schedules"]] == [9, 2]
    assert found["unit"] == "forwards" and found["picture"] is None


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("cost", "--hardware", "h80"), "hardware"),
        (("cost", "--gpus", "100"), "try --gpus 112"),
        (("cost", "--efficiency", "1.5"), "--efficiency"),
        (("cost", "--tokens", "inf"), "--tokens (inf) must be finite"),
        (("cost", "recipes/none.yaml"), "recipes/none.yaml"),
        (("cost", "r.yaml", "--preset", "tiny"), "give one of them"),
        (("memory", "--context", "0"), "context"),
        (("memory", "--cache", "int8"), "cache"),
        (("serve", "--decode-redundant", "31"), "try --decode-redundant 32"),
        (("serve", "--input-rate", "inf"), "input_rate (inf)"),
        (("pipeline", "--schedule", "1f1b,zb2p"), "schedule (zb2p)"),
        (("pipeline", "--forward", "nan"), "forward (nan)"),
        (("pipeline", "--communication", "inf"), "communication (inf)"),
        (("pipeline", "--weight", "3"), "weight (3)"),
        (("pipeline", "--out", "nowhere/p.png"), "does not exist"),
        (("pipeline", "--out", "p.gif"), "must end in .png"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], said: str) -> None:
    done = in_process(*arguments)
    assert isinstance(done.exception, UserError), done.output
    assert said in str(done.exception) and "\n" not in str(done.exception)
    assert done.stdout == ""
