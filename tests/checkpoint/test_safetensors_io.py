"""Our streaming reader and writer beside the safetensors library, and files from strangers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dsv3.checkpoint import safetensors_io
from dsv3.checkpoint.safetensors_io import DTYPES, SafetensorsFile, SafetensorsWriter, checksum, write
from dsv3.common.errors import UserError


def _tensors() -> dict[str, torch.Tensor]:
    drawn = {
        f"{name}.{shape}": torch.randn(shape).mul(40).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in ((3, 5), (7,), (), (0, 4))
        if name != "F8_E8M0"  # the library's Python side of 0.5 does not know it
    }
    drawn["transposed"] = torch.randn(6, 4).t()  # not contiguous
    return drawn


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("chunk", [1, 8, 2**20])
def test_the_library_reads_what_we_write(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "CHUNK", chunk)
    tensors = _tensors()
    digest = write(tmp_path / "a", tensors, metadata={"format": "pt"})
    assert digest == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    read = load_file(tmp_path / "a")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(_bits(read[name]), _bits(tensor)), name
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("chunk", [1, 8, 2**20])
def test_we_read_what_the_library_writes(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "CHUNK", chunk)
    tensors = {name: tensor.contiguous() for name, tensor in _tensors().items()}
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.entries) == set(tensors)
        for name, tensor in tensors.items():
            read = file.read(name)
            assert read.dtype == tensor.dtype and torch.equal(_bits(read), _bits(tensor)), name
            as_double = file.read(name, torch.empty(tensor.shape, dtype=torch.float64))
            assert torch.equal(as_double, tensor.double()) or tensor.double().isnan().any()


def test_cast_on_the_way(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    write(tmp_path / "a", {"x": tensor, "y": tensor}, {"x": torch.bfloat16})
    read = load_file(tmp_path / "a")
    assert torch.equal(read["x"], tensor.bfloat16()) and torch.equal(read["y"], tensor)


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """Readers that map the file need an FP32 tensor at a multiple of 4, odd BF16 tensors before it or not."""
    write(tmp_path / "a", {"odd": torch.ones(3).bfloat16(), "byte": torch.ones(1).byte(), "x": torch.ones(2)})
    with SafetensorsFile(tmp_path / "a") as file:
        assert all(entry.start % entry.dtype.itemsize == 0 for entry in file.entries.values())


def test_names_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="__metadata__"):
        write(tmp_path / "a", {"__metadata__": torch.ones(1)})
    with pytest.raises(UserError, match="complex64"):
        write(tmp_path / "a", {"x": torch.ones(1, dtype=torch.complex64)})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("at_once", [7, 2**20])
def test_written_in_any_order(tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a system that takes few bytes at a time; the same file, and the same checksum read as written."""
    tensors = {name: tensor.contiguous() for name, tensor in _tensors().items()}
    write(tmp_path / "a", tensors, metadata={"format": "pt"})
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda to, content, place: original(to, content[:at_once], place))
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "b", kinds, {"format": "pt"}) as file:
        for name, tensor in reversed(tensors.items()):
            for first in range(0, tensor.numel(), 4):
                file.put(name, first, tensor.view(-1)[first : first + 4])
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert file.checksum == checksum(tmp_path / "b")
    for place in (9, -1):  # in the header, in a tensor
        content = bytearray((tmp_path / "a").read_bytes())
        content[place] ^= 1
        (tmp_path / "b").write_bytes(content)
        with contextlib.suppress(UserError):
            assert file.checksum != checksum(tmp_path / "b")


def _file(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


BAD: dict[str, tuple[Any, bytes, int | None, str]] = {
    "empty": (b"", b"", None, "not JSON"),
    "huge header": (_one(), bytes(8), 2**63, "does not fit"),
    "header longer than the file": (_one(), bytes(8), 1000, "does not fit"),
    "not json": (b"{nope", bytes(8), None, "not JSON"),
    "not utf-8": (b"\xff\xfe", bytes(8), None, "not JSON"),
    "deep json": (b"[" * 100_000, b"", None, "not JSON"),
    "a list": ([], b"", None, "not a JSON object"),
    "entry is a list": ({"x": []}, b"", None, "malformed"),
    "no offsets": ({"x": {"dtype": "F32", "shape": []}}, b"", None, "malformed"),
    "three offsets": (_one(offsets=[0, 4, 8]), bytes(8), None, "malformed"),
    "negative": (_one(offsets=[-8, 0]), bytes(8), None, "natural numbers"),
    "negative shape": (_one(shape=[-2]), bytes(8), None, "natural numbers"),
    "boolean shape": (_one(shape=[True, 2]), bytes(8), None, "natural numbers"),
    "float shape": (_one(shape=[2.0]), bytes(8), None, "natural numbers"),
    "unknown dtype": (_one(dtype="F4"), bytes(8), None, "dtype 'F4'"),
    "dtype is a list": (_one(dtype=[1]), bytes(8), None, "dtype"),
    "wrong size": (_one(shape=[3]), bytes(8), None, "needs 12 bytes"),
    "beyond the end": (_one(offsets=[8, 16]), bytes(8), None, "gaps"),
    "truncated": (_one(), bytes(7), None, "ends? at byte"),
    "bytes left over": (_one(), bytes(9), None, "end at byte"),
    "overlap": ({**_one(), "y": _one(offsets=[4, 12])["x"]}, bytes(12), None, "overlap"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    header, data, length, says = BAD[case]
    path = _file(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(UserError, match=says) as caught:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*gone"):
        SafetensorsFile(tmp_path / "gone")


numbers = st.one_of(st.integers(-2, 20), st.sampled_from([2**31, 2**63, 2**64]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "F31"]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2),
    }
)


@given(header=st.dictionaries(st.sampled_from("abc"), entries), data=st.binary(max_size=24))
def test_we_accept_nothing_that_the_library_refuses(
    tmp_path: Path, header: dict[str, Any], data: bytes
) -> None:
    path = _file(tmp_path / "fuzz", header, data)
    try:
        with SafetensorsFile(path) as file:
            for name in file.entries:
                file.read(name)
    except UserError:
        return
    try:
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == set(file.entries)
    except SafetensorError as error:  # pragma: no cover
        raise AssertionError(f"accepted here, refused there: {error}: {header}") from error
