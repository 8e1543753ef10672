"""Nothing is lost: runs that are really killed, stopped, damaged or out of disk, and go on bit-equal."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from dsv3.checkpoint.safetensors_io import SafetensorsFile
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.train import PretrainRecipe
from dsv3.train.pretrain import pretrain
from dsv3.train.run import read_lines

STEPS = 12


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with SafetensorsFile(folder / "model.safetensors") as file:
        return {name: file.read(name) for name in file.entries}


def same(a: Path, b: Path) -> bool:
    one, other = tensors_of(a), tensors_of(b)
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def recipe_tree(prepared: Path) -> dict:
    from tests.train.conftest import MODEL

    return {
        "model": MODEL, "data": {"path": str(prepared)}, "sequence_length": 32, "device": "cpu",
        "total_tokens": STEPS * 8 * 32, "batch": {"sequences": 8, "micro_sequences": 4},
        "optimizer": {"lr": 1e-2}, "checkpoint": {"every": 2, "keep": 3}, "ema": {"decay": 0.9},
        "validation": {"every": 5, "sequences": 4}, "samples": {"every": 100, "prompts": []},
    }  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(recipe_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return pretrain(recipes.validate(PretrainRecipe, {**recipe_tree, "out": str(out)}))


def start(tree: dict, out: Path, *arguments: str, limit: int | None = None) -> subprocess.Popen:
    """``dsv3 pretrain`` in a process of its own, with the threads of this one."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**tree, "out": str(out)}))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "dsv3", "pretrain", str(path), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        preexec_fn=small_files if limit else None,
    )  # fmt: skip


def wait_for(found, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if found():
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early:\n{process.communicate()[0]}")
        time.sleep(0.01)
    raise AssertionError("nothing happened for a minute")


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    return max((line["step"] for line in read_lines(path)), default=0) if path.exists() else 0


@pytest.mark.parametrize("moment", ["in a step", "in a save"])
def test_kill_nine_then_resume_is_bit_equal(
    recipe_tree: dict, unbroken: Path, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "run"
    process = start(recipe_tree, out)

    def reached() -> bool:
        if moment == "in a step":
            return last_step(out) >= 5
        # a temporary folder is there and an earlier checkpoint too: the save of step 4 or later is under way
        return any(out.glob("checkpoints/.tmp-*")) and (out / "checkpoints/step-000002").exists()

    wait_for(reached, process)
    process.kill()
    process.communicate()
    if not (out / "model").exists():  # else it was over before the signal came
        again = start(recipe_tree, out, "--resume", "auto")
        text = again.communicate(timeout=120)[0]
        assert again.returncode == 0, text
        assert "resumed from step-" in text
    assert same(out / "model", unbroken / "model")
    lines = [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]
    wanted = [line for line in read_lines(unbroken / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    assert [line["loss"] for line in lines] == [line["loss"] for line in wanted]
    assert not list(out.glob("checkpoints/.tmp-*"))


def test_sigterm_saves_and_exits_zero(recipe_tree: dict, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(recipe_tree, out)
    wait_for(lambda: last_step(out) >= 3, process)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    assert f"Go on with: dsv3 pretrain {out}/recipe.yaml --resume auto" in text
    assert not (out / "model").exists()
    saved = json.loads(sorted(out.glob("checkpoints/step-*/trainer/state.json"))[-1].read_text())
    assert saved["progress"]["step"] == last_step(out)
    again = start(recipe_tree, out, "--resume", "auto")
    assert again.communicate(timeout=120) and again.returncode == 0
    assert same(out / "model", unbroken / "model")


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    recipe_tree: dict, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tree = {**recipe_tree, "out": str(tmp_path / "run")}
    half = recipes.validate(PretrainRecipe, {**tree, "total_tokens": 6 * 8 * 32})
    out = pretrain(half)
    (out / "model").rename(tmp_path / "half")
    victim = out / "checkpoints/step-000006/trainer/optimizer.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    pretrain(recipes.validate(PretrainRecipe, tree), "auto")
    log = (out / "log.txt").read_text()
    assert "step-000006/trainer/optimizer.safetensors is damaged" in log
    assert "resumed from step-000004" in log
    assert same(out / "model", unbroken / "model")


def test_a_full_disk_leaves_the_last_good_checkpoint(recipe_tree: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start({**recipe_tree, "total_tokens": 4 * 8 * 32}, out)
    assert first.communicate(timeout=120) and first.returncode == 0
    before = tensors_of(out / "checkpoints/step-000004")
    # No file may grow past 64 KiB: the weights no longer fit, the logs still do.
    second = start(recipe_tree, out, "--resume", "auto", limit=1 << 16)
    text = second.communicate(timeout=120)[0]
    assert second.returncode == 1, text
    assert "cannot write" in text and "step-000006" in text and "Traceback" not in text
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    after = tensors_of(out / "checkpoints/step-000004")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_model_is_not_resumed(recipe_tree: dict, tmp_path: Path) -> None:
    tree = {**recipe_tree, "out": str(tmp_path / "run"), "total_tokens": 2 * 8 * 32}
    out = pretrain(recipes.validate(PretrainRecipe, tree))
    (out / "model").rename(tmp_path / "model")
    wider = {"model": {**tree["model"], "moe_intermediate_size": 48}}
    for change, words in (
        ({"seed": 1}, r"seed \(1\)"),
        ({"sequence_length": 16}, r"sequence_length \(16\)"),
        (wider, r"model\.moe_intermediate_size \(48\)"),  # the key alone, not the section in two versions
    ):
        with pytest.raises(UserError, match=rf"^{words} differs from the run in \S+ \(\d+\); use"):
            pretrain(recipes.validate(PretrainRecipe, {**tree, **change}), "auto")


def test_a_checkpoint_older_than_a_key_goes_on(recipe_tree: dict, tmp_path: Path) -> None:
    tree = {**recipe_tree, "out": str(tmp_path / "run")}
    pretrain(recipes.validate(PretrainRecipe, {**tree, "total_tokens": 2 * 8 * 32}))
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    state = json.loads((checkpoint / "trainer/state.json").read_text())
    del state["recipe"]["data"]["mask_documents"], state["recipe"]["start"]
    text = json.dumps(state)
    (checkpoint / "trainer/state.json").write_text(text)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest["files"]["trainer/state.json"] = {"bytes": len(text.encode()), "sha256": digest}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    pretrain(recipes.validate(PretrainRecipe, {**tree, "total_tokens": 3 * 8 * 32}), "auto")
    assert last_step(tmp_path / "run") == 3


def test_resume_auto_begins_where_there_is_nothing(recipe_tree: dict, tmp_path: Path) -> None:
    tree = {**recipe_tree, "out": str(tmp_path / "run"), "total_tokens": 2 * 8 * 32}
    assert (pretrain(recipes.validate(PretrainRecipe, tree), "auto") / "model").exists()


def test_a_longer_run_goes_on_and_its_model_takes_the_place(recipe_tree: dict, tmp_path: Path) -> None:
    tree = {**recipe_tree, "out": str(tmp_path / "run")}
    out = pretrain(recipes.validate(PretrainRecipe, {**tree, "total_tokens": 2 * 8 * 32}))
    short = tensors_of(out / "model")
    pretrain(recipes.validate(PretrainRecipe, {**tree, "total_tokens": 4 * 8 * 32}), "auto")
    long = tensors_of(out / "model")
    assert "changed since it was saved: total_tokens 512 -> 1024" in (out / "log.txt").read_text()
    assert not torch.equal(short["lm_head.weight"], long["lm_head.weight"])
    assert same(out / "model", out / "checkpoints/step-000004")
    assert (out / "model/tokenizer.json").exists()


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_written(
    recipe_tree: dict, tmp_path: Path
) -> None:
    recipe = recipes.validate(PretrainRecipe, {**recipe_tree, "out": str(tmp_path / "run")})
    with pytest.raises(UserError, match="is no checkpoint's folder"):
        pretrain(recipe, str(tmp_path / "step-9"))
    assert not (tmp_path / "run").exists()
