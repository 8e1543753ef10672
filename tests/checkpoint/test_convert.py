"""Folders from one number format to another and back; kills, damage, full disks, sources that change."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.checkpoint import fp8, names
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.errors import CheckpointError
from dsv3.checkpoint.hf import load, save
from dsv3.checkpoint.weights import Weights
from dsv3.common.errors import UserError
from tests.checkpoint.conftest import random_model, same

SIZES = dict(hidden_size=160, intermediate_size=272, num_hidden_layers=2, moe_intermediate_size=136)
FP8 = torch.float8_e4m3fn
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 folder of nine shards with a tokenizer and a strange file beside it."""
    path = tmp_path_factory.mktemp("convert") / "bf16"
    save(random_model(**SIZES), path, dtype="bfloat16", max_shard_bytes=150_000)
    (path / "tokenizer.json").write_text("{}")
    (path / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.6}')
    (path / "strange.py").write_text("raise SystemExit")
    assert len(list(path.glob("*.safetensors"))) > 6
    return path


@pytest.fixture(scope="module")
def in_fp8(bf16: Path) -> Path:
    """The same in FP8."""
    convert(bf16, bf16.parent / "fp8", "fp8")
    return bf16.parent / "fp8"


def _read(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_released_layout(bf16: Path, in_fp8: Path, tmp_path: Path) -> None:
    """The same tensors, configuration and index as ``save`` writes, in the source's files."""
    save(load(bf16), tmp_path / "saved", fp8=True)
    ours, theirs = _read(in_fp8), _read(tmp_path / "saved")
    assert set(ours) == set(theirs)
    assert all(
        ours[k].dtype == theirs[k].dtype and torch.equal(_bits(ours[k]), _bits(theirs[k])) for k in ours
    )
    assert (in_fp8 / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()
    assert {path.name for path in in_fp8.glob("*.safetensors")} == {
        path.name for path in bf16.glob("*.safetensors")
    }
    index, before = (json.loads((folder / INDEX).read_text()) for folder in (in_fp8, bf16))
    assert index["weight_map"] == {k: f.name for f in in_fp8.glob("*.safetensors") for k in load_file(f)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    scales = {name for name in index["weight_map"] if name.endswith("_scale_inv")}
    assert scales and set(index["weight_map"]) - scales == set(before["weight_map"])
    assert all(
        index["weight_map"][name] == before["weight_map"][name.removesuffix("_scale_inv")] for name in scales
    )
    # What goes along, and what does not.
    assert (in_fp8 / "tokenizer.json").read_text() == "{}" and not (in_fp8 / "strange.py").exists()
    assert json.loads((in_fp8 / "generation_config.json").read_text())["temperature"] == 0.6
    assert not list(in_fp8.parent.glob(".tmp-*"))
    assert same(load(in_fp8), load(tmp_path / "saved"))


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
@pytest.mark.parametrize("between", ["bf16", "fp32"])
def test_there_and_back(bf16: Path, tmp_path: Path, between: str, scale_format: str) -> None:
    convert(bf16, tmp_path / "a", "fp8", scale_format)
    convert(tmp_path / "a", tmp_path / "b", between)
    dtypes = {tensor.dtype for name, tensor in _read(tmp_path / "b").items() if not name.endswith("bias")}
    assert dtypes == {torch.bfloat16 if between == "bf16" else torch.float32}
    tree = json.loads((tmp_path / "b" / "config.json").read_text())
    assert tree["torch_dtype"] == ("bfloat16" if between == "bf16" else "float32")
    assert "quantization_config" not in tree
    assert same(load(tmp_path / "b"), load(tmp_path / "a", dtype=tree["torch_dtype"]))
    convert(tmp_path / "b", tmp_path / "c", "fp8", scale_format)
    if between == "fp32" or scale_format == "ue8m0":
        assert _files(tmp_path / "c") == _files(tmp_path / "a")
        return
    one, other = _read(tmp_path / "a"), _read(tmp_path / "c")
    for name, tensor in one.items():
        if name.endswith("_scale_inv"):
            assert bool(((other[name] - tensor).abs() <= 2.0**-8 * tensor).all()), name
        else:
            assert torch.equal(_bits(other[name]), _bits(tensor)), name


def test_ue8m0(bf16: Path, in_fp8: Path, tmp_path: Path) -> None:
    convert(bf16, tmp_path / "a", "fp8", "ue8m0")
    quantization = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert quantization["scale_fmt"] == "ue8m0" and quantization["weight_block_size"] == [128, 128]
    for name, tensor in _read(tmp_path / "a").items():
        if name.endswith("_scale_inv"):
            assert tensor.dtype == torch.float32 and bool((tensor.frexp()[0] == 0.5).all())
    # From FP8 with other scales too: its numbers are rounded once more.
    convert(in_fp8, tmp_path / "b", "fp8", "ue8m0")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"] == quantization
    stored, dense = _read(tmp_path / "b"), dict(names.hf_tensors(load(in_fp8, dtype="float32")))
    name = "model.layers.0.mlp.up_proj.weight"
    expected = fp8.quantised(dense[name], ue8m0=True)
    assert torch.equal(stored[f"{name}_scale_inv"], expected.scales)
    assert torch.equal(_bits(stored[name]), _bits(expected.values))
    with pytest.raises(UserError, match="is in fp8 already"):
        convert(tmp_path / "a", tmp_path / "c", "fp8")


@pytest.mark.parametrize(("workers", "band"), [(1, 1), (5, 1), (3, 30_000)])
def test_bytes_do_not_depend_on_the_way(
    bf16: Path, in_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, band: int
) -> None:
    monkeypatch.setattr(fp8, "BAND", band)
    convert(bf16, tmp_path / "a", "fp8", workers=workers)
    assert _files(tmp_path / "a") == _files(in_fp8)


def test_one_file_stays_one(bf16: Path, in_fp8: Path, tmp_path: Path) -> None:
    save(load(bf16), tmp_path / "a")
    result = convert(tmp_path / "a", tmp_path / "b", "fp8")
    assert result.files == 1 and not (tmp_path / "b" / INDEX).exists()
    assert same(load(tmp_path / "b"), load(in_fp8))
    assert result.written_bytes == sum(tensor.nbytes for tensor in _read(tmp_path / "b").values())
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_scales_in_another_file(in_fp8: Path, tmp_path: Path) -> None:
    """As at the borders of the released files; the file of scales alone is no more."""
    (tmp_path / "a").mkdir()
    tensors = _read(in_fp8)
    scales = {name: tensors.pop(name) for name in [*tensors] if name.endswith("_scale_inv")}
    save_file(tensors, tmp_path / "a" / "model-00001-of-00002.safetensors")
    save_file(scales, tmp_path / "a" / "model-00002-of-00002.safetensors")
    where = {k: f.name for f in sorted((tmp_path / "a").iterdir()) for k in load_file(f)}
    (tmp_path / "a" / INDEX).write_text(json.dumps({"weight_map": where}))
    shutil.copy(in_fp8 / "config.json", tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "bf16")
    assert [path.name for path in (tmp_path / "b").glob("*.safetensors")] == [
        "model-00001-of-00002.safetensors"
    ]
    assert same(load(tmp_path / "b"), load(in_fp8, dtype="bfloat16"))


def test_copies_in_mtp_layers_stay_what_they_are(bf16: Path, tmp_path: Path) -> None:
    save(load(bf16), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    copy = "model.layers.2.embed_tokens.weight"
    tensors[copy][3] += 1
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "a", tmp_path / "b", "fp8")
    stored = _read(tmp_path / "b")
    for name in names.mtp_repeats(load(bf16).config):
        assert torch.equal(stored[name], tensors[name]), name
    assert not torch.equal(stored[copy], stored["model.embed_tokens.weight"])


# Refusals: one line, and nothing on the disk.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"to": "fp7"}, r"--to \(fp7\) is unknown.*fp8, bf16, fp32"),
        (
            {"to": "fp8", "scale_format": "e8m0"},
            r"--scale-format \(e8m0\) is unknown \(did you mean ue8m0\?\)",
        ),
        ({"to": "bf16", "scale_format": "ue8m0"}, "is for --to fp8"),
        ({"to": "fp8", "workers": 0}, r"--workers \(0\) must be at least 1"),
        ({"to": "bf16"}, "is in bf16 already"),
        ({"to": "fp8", "source": "nowhere"}, "nowhere is not a folder"),
        ({"to": "fp8", "target": "."}, "already exists"),
    ],
    ids=str,
)
def test_what_makes_no_sense(bf16: Path, tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    source, target = arguments.pop("source", bf16), tmp_path / "new" / arguments.pop("target", "x")
    if target == tmp_path / "new":
        target.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says) as caught:
        convert(source, target, **arguments)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_a_source_that_is_not_whole(in_fp8: Path, tmp_path: Path) -> None:
    damaged = _copy(in_fp8, tmp_path / "a")
    shard = sorted(damaged.glob("*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        convert(damaged, tmp_path / "b", "bf16")
    shard.unlink()
    with pytest.raises(UserError, match=f"shard {shard.name} is missing"):
        convert(damaged, tmp_path / "b", "bf16")
    tensors = load_file(in_fp8 / shard.name)
    lost = next(name for name in tensors if name.endswith("_scale_inv"))
    del tensors[lost]
    save_file(tensors, shard)
    index = json.loads((damaged / INDEX).read_text())
    del index["weight_map"][lost]
    (damaged / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"1 missing \(.*_scale_inv\)"):
        convert(damaged, tmp_path / "b", "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_no_room(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"x needs .*B, the disk has 100KB free"):
        convert(bf16, tmp_path / "x", "fp8")
    assert not list(tmp_path.iterdir())


def test_weights_that_fp8_cannot_hold(bf16: Path, tmp_path: Path) -> None:
    model = load(bf16)
    model.model.layers[0].mlp.up_proj.weight.data[200, 7] = float("nan")
    save(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight .* a NaN"):
        convert(tmp_path / "a", tmp_path / "b", "fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


# Interruptions.

SLOW = """
import os, sys, time
from dsv3.checkpoint.convert import convert
sync = os.fsync
def slow(descriptor):
    time.sleep(0.05)
    sync(descriptor)
os.fsync = slow
convert(*sys.argv[1:3], "fp8", workers=2)
"""


def _kill_after(source: Path, target: Path, files: int) -> dict[str, Any]:
    """Convert in another process, slowly, and kill it when so many files are whole; what its journal says."""
    journal = target.with_name(f".tmp-convert-{target.name}") / "journal.json"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(target)])
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if len(json.loads(journal.read_text())["done"]) >= files:
                break
        except FileNotFoundError:
            pass
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    return json.loads(journal.read_text())


def test_killed_and_continued(bf16: Path, in_fp8: Path, tmp_path: Path) -> None:
    for files in (1, 5):  # the same conversion, killed twice
        done = _kill_after(bf16, tmp_path / "x", files)["done"]
        assert len(done) >= files and not (tmp_path / "x").exists()
    work = tmp_path / ".tmp-convert-x" / "model"
    before = {file: (work / file).stat().st_mtime_ns for file in done}
    (work / "model-99.safetensors").write_text("left behind")
    result = convert(bf16, tmp_path / "x", "fp8")
    assert _files(tmp_path / "x") == _files(in_fp8)
    assert {file: (tmp_path / "x" / file).stat().st_mtime_ns for file in done} == before  # not written again
    assert 0 < result.written_bytes < sum(tensor.nbytes for tensor in _read(in_fp8).values())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def _stop_after(monkeypatch: pytest.MonkeyPatch, files: int, error: BaseException) -> None:
    """Make the writing of the file after so many fail."""
    original, left = os.pwrite, [files]

    def pwrite(descriptor: int, content: memoryview, place: int) -> int:
        if place == 0:
            left[0] -= 1
        if left[0] < 0:
            raise error
        return original(descriptor, content, place)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.fixture
def begun(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The target of a conversion that was interrupted after four files."""
    with monkeypatch.context() as patch:
        _stop_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(bf16, tmp_path / "x", "fp8", workers=1)
    assert len(list((tmp_path / ".tmp-convert-x" / "model").iterdir())) == 4
    return tmp_path / "x"


def test_a_disk_that_gets_full(
    bf16: Path,
    in_fp8: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        _stop_after(patch, 2, OSError(28, "No space left on device"))
        with pytest.raises(CheckpointError, match="No space left on device; free some space") as caught:
            convert(bf16, tmp_path / "x", "fp8", workers=1)
    assert caught.value.exit_code == 1
    assert "2 files are whole" in capsys.readouterr().err
    assert len(list((tmp_path / ".tmp-convert-x" / "model").iterdir())) == 2
    convert(bf16, tmp_path / "x", "fp8")
    assert _files(tmp_path / "x") == _files(in_fp8)


def test_what_was_damaged_meanwhile_is_written_again(
    bf16: Path, in_fp8: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = begun.with_name(".tmp-convert-x") / "model"
    first, second, third, _ = sorted(work.iterdir())
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-5])
    third.unlink()
    convert(bf16, begun, "fp8")
    assert _files(begun) == _files(in_fp8)
    said = capsys.readouterr().err
    assert all(f"{path.name} is damaged: it is written again" in said for path in (first, second, third))


def _touch(source: Path) -> None:
    os.utime(sorted(source.glob("*.safetensors"))[0])


def _edit_config(source: Path) -> None:
    tree = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**tree, "note": 1}))


@pytest.mark.parametrize("change", [_touch, _edit_config])
def test_a_source_that_changed_meanwhile(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
) -> None:  # fmt: skip
    source = _copy(bf16, tmp_path / "a")
    with monkeypatch.context() as patch:
        _stop_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "x", "fp8", workers=1)
    change(source)
    whole = sum(tensor.nbytes for tensor in _read(bf16).values())
    assert convert(source, tmp_path / "x", "fp8").read_bytes == whole
    assert "starting again" in capsys.readouterr().err


def test_another_format_starts_again(bf16: Path, begun: Path, tmp_path: Path) -> None:
    convert(bf16, begun, "fp8", "ue8m0")
    convert(bf16, tmp_path / "y", "fp8", "ue8m0")
    assert _files(begun) == _files(tmp_path / "y")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"job": 1, "done": {"model.safetensors": "0"}}'])
def test_a_journal_that_makes_no_sense(bf16: Path, in_fp8: Path, begun: Path, content: str) -> None:
    (begun.with_name(".tmp-convert-x") / "journal.json").write_text(content)
    convert(bf16, begun, "fp8")
    assert _files(begun) == _files(in_fp8)


def test_another_version_starts_again(
    bf16: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dsv3.checkpoint.convert.MADE_BY", "dsv3-convert/99")
    convert(bf16, begun, "fp8")
    assert "starting again" in capsys.readouterr().err


@pytest.mark.parametrize("change", [_touch, lambda source: sorted(source.glob("*.safetensors"))[0].unlink()])
def test_a_source_that_changes_under_way(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    source = _copy(bf16, tmp_path / "a")
    original, calls = Weights.rows, [0]

    def rows(self: Weights, name: str, first: int, last: int) -> Tensor:
        calls[0] += 1
        if calls[0] == 60:
            change(source)
        return original(self, name, first, last)

    monkeypatch.setattr(Weights, "rows", rows)
    with pytest.raises(CheckpointError, match="a changed while it was read; run the same command again"):
        convert(source, tmp_path / "x", "fp8", workers=1)
    assert not (tmp_path / "x").exists()


def test_two_at_once(bf16: Path, begun: Path) -> None:
    work = begun.with_name(".tmp-convert-x")
    with open(work / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="x is being written by another process"):
            convert(bf16, begun, "fp8")
    assert len(list((work / "model").iterdir())) == 4


def test_one_thread_a_worker(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers must not start threads of their own; torch has as many as before afterwards."""
    before, seen = torch.get_num_threads(), set()
    original = Weights.rows

    def rows(self: Weights, name: str, first: int, last: int) -> Tensor:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return original(self, name, first, last)

    monkeypatch.setattr(Weights, "rows", rows)
    try:
        torch.set_num_threads(2)
        convert(bf16, tmp_path / "x", "fp8", workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 2 and {threads for _, threads in seen} == {1}
