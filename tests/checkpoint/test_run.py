"""Training checkpoints: exact, whole or absent, and damage is named."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint import run, safetensors_io
from dsv3.checkpoint.errors import CheckpointError, DamagedCheckpoint
from dsv3.checkpoint.hf import load
from dsv3.common.errors import UserError
from dsv3.model import DeepSeekV3
from tests.checkpoint.conftest import random_model, same

STATE = {
    "step": 3,
    "tokens": 2**60,
    "loss": 0.1 + 0.2,
    "nan": math.nan,
    "name": "é",
    "list": [1, [2]],
    "none": None,
}


def _optimizer() -> dict[str, torch.Tensor]:
    return {
        "exp_avg/lm_head.weight": torch.randn(96, 32),
        "exp_avg_sq/lm_head.weight": torch.rand(96, 32).bfloat16(),
        "step": torch.tensor(7, dtype=torch.int64),
        "generator": torch.get_rng_state(),
        "empty": torch.empty(0),
    }


def _write(checkpoints: Path, step: int, model: DeepSeekV3, **state: Any) -> Path:
    folder = run.step_folder(checkpoints, step)
    run.write(folder, model=model, tensors=_optimizer(), state={"step": step, **state})
    return folder


def _hidden(checkpoints: Path) -> list[str]:
    return [path.name for path in checkpoints.iterdir() if not path.name.startswith("step-")]


def test_round_trip(tmp_path: Path, model: DeepSeekV3) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    tensors = _optimizer()
    folder = tmp_path / "checkpoints" / "step-000003"
    run.write(
        folder, model=model, tensors=tensors, state=STATE, tokenizer_files=[tmp_path / "tokenizer.json"]
    )
    other = random_model(seed=5)
    addresses = [tensor.data_ptr() for tensor in other.state_dict().values()]
    read, state = run.read_into(folder, other)
    assert same(model, other)
    assert addresses == [tensor.data_ptr() for tensor in other.state_dict().values()]  # in place
    assert list(sorted(read)) == list(sorted(tensors))
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert math.isnan(state.pop("nan")) and state == {k: v for k, v in STATE.items() if k != "nan"}
    run.verify(folder)
    assert run.latest(tmp_path / "checkpoints") == (folder, [])
    assert _hidden(tmp_path / "checkpoints") == []
    listed = json.loads((folder / "MANIFEST.json").read_text())["files"]
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(listed) | {"MANIFEST.json"} == there
    assert there >= {
        "config.json", "model.safetensors", "tokenizer.json", "trainer/optimizer.safetensors",
        "trainer/state.json",
    }  # fmt: skip


def test_every_checkpoint_is_a_model(tmp_path: Path, model: DeepSeekV3) -> None:
    transformers = pytest.importorskip("transformers")
    folder = _write(tmp_path, 1, model)
    assert same(load(folder), model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 20))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits_BTV, atol=1e-4, rtol=0)


def test_order_and_names(tmp_path: Path) -> None:
    for name in ("step-000009", "step-000010", "step-1234567", "step-9", "step-abcdef", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000011").touch()
    assert [path.name for path in run.steps(tmp_path)] == ["step-1234567", "step-000010", "step-000009"]
    assert run.step_folder(tmp_path, 1234567).name == "step-1234567"
    assert run.steps(tmp_path / "gone") == [] and run.latest(tmp_path / "gone") == (None, [])


# Damage.

FILES = [
    "model.safetensors", "config.json", "generation_config.json", "trainer/optimizer.safetensors",
    "trainer/state.json", "MANIFEST.json",
]  # fmt: skip


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


DAMAGE = {
    "flipped bit": _flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, copied and then damaged by the tests."""
    folder = tmp_path_factory.mktemp("pair")
    model = random_model()
    for step in (1, 2):
        _write(folder, step, model)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, pair: Path, file: str, damage: str
) -> None:
    checkpoints = tmp_path / "c"
    shutil.copytree(pair, checkpoints)
    newest = checkpoints / "step-000002"
    DAMAGE[damage](newest / file)
    with pytest.raises(DamagedCheckpoint, match=f"step-000002/{file}"):
        run.verify(newest)
    found, messages = run.latest(checkpoints)
    assert found == checkpoints / "step-000001"
    assert len(messages) == 1 and f"step-000002/{file}" in messages[0] and "\n" not in messages[0]
    run.keep_last(checkpoints, 1)  # must not cost the good one
    if damage != "flipped bit" or file == "MANIFEST.json":
        assert run.latest(checkpoints)[0] == checkpoints / "step-000001"


def test_all_damaged(tmp_path: Path, pair: Path) -> None:
    shutil.copytree(pair, tmp_path / "c")
    for folder in run.steps(tmp_path / "c"):
        _flip(folder / "model.safetensors")
    found, messages = run.latest(tmp_path / "c")
    assert found is None and len(messages) == 2


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', '{"files": {"config.json": {}}}', "\0"])
def test_manifest_that_lists_nothing(tmp_path: Path, pair: Path, content: str) -> None:
    shutil.copytree(pair / "step-000001", tmp_path / "step-000001")
    (tmp_path / "step-000001" / "MANIFEST.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"MANIFEST\.json"):
        run.verify(tmp_path / "step-000001")


def test_a_disk_that_refuses_to_read(
    tmp_path: Path, model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, 1, model)

    def fails(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(run, "sha256", fails)
    assert run.latest(tmp_path)[0] is None
    assert "cannot be read: Input/output error" in run.latest(tmp_path)[1][0]


# Resuming into the wrong model.


def test_another_shape_is_refused_untouched(tmp_path: Path, model: DeepSeekV3) -> None:
    folder = _write(tmp_path, 1, model)
    other, untouched = random_model(seed=3, vocab_size=64), random_model(seed=3, vocab_size=64)
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is \[96, 32\]"):
        run.read_into(folder, other)
    assert same(other, untouched)
    with pytest.raises(UserError, match="unexpected"):
        run.read_into(folder, random_model(num_nextn_predict_layers=0))


def test_another_dtype_is_refused(tmp_path: Path, model: DeepSeekV3) -> None:
    folder = _write(tmp_path, 1, model)
    with pytest.raises(UserError, match=r"would round model\.embed_tokens\.weight \(torch\.float32"):
        run.read_into(folder, random_model().bfloat16())


# Going back, deleting.


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path, model: DeepSeekV3) -> None:
    _write(tmp_path, 1, model, note="old")
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".tmp-new-step-000001")  # a killed writer's
    new = random_model(seed=9)
    folder = _write(tmp_path, 1, new, note="new")
    assert run.latest(tmp_path) == (folder, []) and _hidden(tmp_path) == []
    back = random_model()
    assert run.read_into(folder, back)[1]["note"] == "new" and same(back, new)


def test_keep_last(tmp_path: Path, model: DeepSeekV3) -> None:
    for step in (1, 2, 3, 4):
        _write(tmp_path, step, model)
    (tmp_path / ".tmp-77-step-000005").mkdir()
    (tmp_path / ".tmp-77-step-000005" / "model.safetensors").touch()
    (tmp_path / "notes").mkdir()
    run.keep_last(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-000003", "step-000004"]
    run.keep_last(tmp_path, 5)
    assert len(run.steps(tmp_path)) == 2
    with pytest.raises(UserError, match=r"\(0\) must be at least 1"):
        run.keep_last(tmp_path, 0)
    run.keep_last(tmp_path / "gone", 1)


def test_an_interrupted_deletion_leaves_nothing_that_looks_good(
    tmp_path: Path, model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        _write(tmp_path, step, model)

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            next(path.rglob("*.safetensors")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.keep_last(tmp_path, 1)
    assert [path.name for path in run.steps(tmp_path)] == ["step-000002"] and len(_hidden(tmp_path)) == 1
    run.keep_last(tmp_path, 1)
    assert _hidden(tmp_path) == []


# Writers that die, disks that fill.

CHILD = """
import resource, sys, time
from pathlib import Path
import torch
from dsv3.checkpoint import run, hf
from dsv3.common import files
from tests.checkpoint.conftest import random_model
where, moment = Path(sys.argv[1]), sys.argv[2]
model = random_model()
def write(step):
    tensors = {"exp_avg": torch.zeros(200_000)}
    run.write(run.step_folder(where, step), model=model, tensors=tensors, state={"step": step})
def stall(*_, **__):
    print("now", flush=True)
    time.sleep(60)
write(1)
write(2)
if moment == "weights":
    hf._generation_config = stall
elif moment == "optimizer":
    run.write_tensors = lambda path, tensors: (Path(path).write_bytes(b"half"), stall())
elif moment == "manifest":
    run.write_json = stall
elif moment == "rename":
    files.os.rename = stall
elif moment == "swap":
    run._aside, aside = (lambda folder: (aside(folder), stall())), run._aside
    write(2)
elif moment == "full":
    for limit in map(int, sys.argv[3:]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write(3)
        except run.CheckpointError as error:
            print(limit, error)
    sys.exit(0)
write(3)
"""
ROOT = Path(__file__).parents[2]


def _child(checkpoints: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(checkpoints), *arguments],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("moment", ["weights", "optimizer", "manifest", "rename", "swap"])
def test_kill_in_the_middle_of_a_write(tmp_path: Path, model: DeepSeekV3, moment: str) -> None:
    with _child(tmp_path, moment) as child:
        assert child.stdout is not None and child.stdout.readline() == "now\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    seen = [path.name for path in run.steps(tmp_path)]
    # Between the two renames of a step written again, that step alone is out of sight.
    assert seen == (["step-000001"] if moment == "swap" else ["step-000002", "step-000001"])
    for folder in run.steps(tmp_path):
        run.verify(folder)
    assert run.latest(tmp_path) == (tmp_path / seen[0], [])
    assert _hidden(tmp_path)  # half-written, under a name that says so
    _write(tmp_path, 3, model)  # the run goes on and sweeps up
    run.keep_last(tmp_path, 2)
    assert [path.name for path in run.steps(tmp_path)] == ["step-000003", seen[0]]
    assert _hidden(tmp_path) == []


def test_disk_full(tmp_path: Path) -> None:
    """A real refusal of the kernel, in the header, the weights or the optimizer's state."""
    limits = ["0", "1000", "100000", "700000"]
    with _child(tmp_path, "full", *limits) as child:
        lines = child.communicate()[0].splitlines()
    assert child.returncode == 0
    where = tmp_path / "step-000003"
    assert [line.split(";")[0] for line in lines] == [
        f"{limit} cannot write {where}: File too large" for limit in limits
    ]
    assert all("free some space" in line for line in lines)
    assert [path.name for path in run.steps(tmp_path)] == ["step-000002", "step-000001"]
    assert _hidden(tmp_path) == [] and run.latest(tmp_path)[0] == tmp_path / "step-000002"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_in_the_writer() -> None:
    with pytest.raises(OSError, match="No space left"):
        safetensors_io.write("/dev/full", {"x": torch.ones(1)})
    with pytest.raises(OSError, match="No space left"):
        safetensors_io.write("/dev/full", {"x": torch.ones(10**6)})


def test_a_folder_that_may_not_be_written(tmp_path: Path, model: DeepSeekV3) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*file/step-000001: .*; choose a folder"):
        _write(tmp_path / "file", 1, model)
