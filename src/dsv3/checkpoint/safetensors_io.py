"""Read and write safetensors files as streams, one tensor at a time.

The format: eight bytes of header length (little-endian), a JSON header ``{name: {dtype, shape,
data_offsets}}``, then the raw bytes. The library's ``save_file`` copies a whole file's tensors before it
writes, and what it maps to read counts as resident memory; here a tensor of the file's dtype is read straight
into its own memory, and every other path goes through one buffer of ``CHUNK`` bytes. Reads and the writes of
:class:`SafetensorsWriter` name their place in the file, so threads may share both.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.errors import CheckpointError
from dsv3.common.errors import UserError

CHUNK = 4 * 2**20  # bytes; large enough for full disk speed, small beside any model
MAX_HEADER = 100_000_000  # bytes; the library's own limit

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}  # what transformers wants to see in a file's header
Kind = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype, shape, first byte (from the start of the file) and length in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, not copied."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def nbytes(kind: Kind) -> int:
    """Bytes of a tensor's numbers."""
    return math.prod(kind[1]) * kind[0].itemsize


class SafetensorsFile:
    """An open file: ``entries`` by name (checked), and tensors read on demand.

    Raises :class:`UserError` where the file is not whole or not safetensors: a header that does not parse, is
    too long, or whose tensors do not fill the file exactly, without gap or overlap.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
            self._map: mmap.mmap | None = None
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        try:
            self.metadata, self.entries = self._header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading ends here."""
        self._file.close()

    def _refuse(self, why: str) -> UserError:
        return UserError(f"{self.path} is damaged or not a safetensors file: {why}; fetch it again")

    def _header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        whole = self.path.stat().st_size
        length = int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
        if whole < 8 or length > min(MAX_HEADER, whole - 8):
            raise self._refuse(f"a header of {length} bytes does not fit ({whole} bytes in the file)")
        content = bytearray(length)
        self._fill(memoryview(content), 8)
        try:
            tree = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError):
            raise self._refuse("its header is not JSON") from None
        if not isinstance(tree, dict):
            raise self._refuse("its header is not a JSON object")
        metadata = tree.pop("__metadata__", None) or {}
        entries = {name: self._entry(name, value, 8 + length) for name, value in tree.items()}
        end = 8 + length
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size)):
            if entry.start != end:
                raise self._refuse("its tensors overlap or leave gaps")
            end += entry.size
        if end != whole:
            raise self._refuse(f"its tensors end at byte {end}, the file at {whole}")
        return metadata, entries

    def _entry(self, name: str, value: Any, base: int) -> Entry:
        try:
            kind, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError):
            raise self._refuse(f"the header's entry {name!r} is malformed") from None
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise self._refuse(f"the header's entry {name!r} holds something else than natural numbers")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {kind!r}, which dsv3 does not read")
        size = math.prod(shape) * DTYPES[kind].itemsize
        if end - begin != size:
            raise self._refuse(
                f"{name} {list(shape)} {kind} needs {size} bytes, the header gives {end - begin}"
            )
        return Entry(DTYPES[kind], shape, base + begin, size)

    def _fill(self, view: memoryview, place: int) -> None:
        """Read exactly ``len(view)`` bytes from ``place`` on (one system call gives at most 2 GB)."""
        while len(view):
            try:
                got = os.preadv(self._file.fileno(), [view], place)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from None
            if not got:
                raise self._refuse("it ends early")
            view, place = view[got:], place + got

    def part(self, name: str, first: int, count: int) -> Tensor:
        """``count`` elements of the flat tensor from ``first`` on, as stored: a 1-D CPU tensor."""
        entry = self.entries[name]
        found = torch.empty(count, dtype=entry.dtype, device="cpu")
        self._fill(_raw(found), entry.start + first * entry.dtype.itemsize)
        return found

    def pieces(self, name: str, elements: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The tensor, flat, in pieces: ``(first element, 1-D CPU tensor)``, in a buffer used again and again.

        A piece has ``elements`` elements (the last may be shorter), by default ``CHUNK`` bytes.
        """
        entry = self.entries[name]
        total = math.prod(entry.shape)
        step = elements or max(1, CHUNK // entry.dtype.itemsize)
        buffer = torch.empty(min(step, total), dtype=entry.dtype, device="cpu")
        for first in range(0, total, step):
            piece = buffer[: total - first]
            self._fill(_raw(piece), entry.start + first * entry.dtype.itemsize)
            yield first, piece

    @torch.no_grad()
    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """Read a tensor into ``into`` (contiguous, same shape; any dtype and device), or into a new one."""
        entry = self.entries[name]
        if into is None:
            into = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if into.dtype == entry.dtype and into.device.type == "cpu":
            self._fill(_raw(into), entry.start)
        else:
            flat = into.view(-1)
            for first, piece in self.pieces(name):
                flat[first : first + len(piece)].copy_(piece)
        return into

    def mapped(self, name: str) -> Tensor:
        """The tensor where it lies in the file: read when it is looked at, and again when memory was short.

        It outlives :meth:`close`. What is written to it stays in this process. The file must stay as it is:
        a process that looks at a part that was cut off is killed.
        """
        if self._map is None:
            # Private, so that the file is never written; no memory is set aside for what might be.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            self._map = mmap.mmap(self._file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        entry = self.entries[name]
        count = math.prod(entry.shape)
        return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.start).view(
            entry.shape
        )


def layout(
    kinds: Mapping[str, Kind], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file with these tensors, and where each will lie, in the order of the file."""
    for name, (dtype, _) in kinds.items():
        if name == "__metadata__" or dtype not in NAMES:
            raise UserError(f"tensor {name!r} ({dtype}) cannot be stored in a safetensors file")
    # Widest first, as the library does it: then every tensor is aligned for readers that map the file.
    order = sorted(kinds, key=lambda name: -kinds[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ends, end = {}, 0
    for name in order:
        dtype, shape = kinds[name]
        begin, end = end, end + nbytes(kinds[name])
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        ends[name] = begin, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    entries = {
        name: Entry(*kinds[name], len(first) + ends[name][0], ends[name][1] - ends[name][0]) for name in order
    }
    return first, entries


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file piece by piece; returns its SHA-256 in hex.

    ``dtypes`` names the tensors to be cast on the way (any device). Nothing is flushed to disk: use it
    inside :func:`dsv3.common.files.new_folder`, which does. Raises OSError when the disk is full.
    """
    kinds = {
        name: ((dtypes or {}).get(name, tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    first_bytes, entries = layout(kinds, metadata)
    digest = hashlib.sha256(first_bytes)
    with open(path, "wb") as file:
        file.write(first_bytes)
        for name, entry in entries.items():
            flat = tensors[name].detach().reshape(-1)
            step = max(1, CHUNK // max(entry.dtype.itemsize, flat.dtype.itemsize))
            for first in range(0, flat.numel(), step):
                piece = _raw(flat[first : first + step].to("cpu", entry.dtype).contiguous())
                file.write(piece)
                digest.update(piece)
    return digest.hexdigest()


class SafetensorsWriter:
    """A file whose layout is known before its content: tensors come in any order, from any thread.

    Each tensor's own pieces come in order, from one thread. Raises OSError when the disk is full.
    """

    def __init__(
        self, path: str | Path, kinds: Mapping[str, Kind], metadata: Mapping[str, str] | None = None
    ):
        first_bytes, self.entries = layout(kinds, metadata)
        self._sums = dict.fromkeys(self.entries, 0)
        self._header_sum = zlib.crc32(first_bytes)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(
                self._descriptor, len(first_bytes) + sum(entry.size for entry in self.entries.values())
            )
            self._write(memoryview(first_bytes), 0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def put(self, name: str, first: int, piece: Tensor) -> None:
        """Write elements of the flat tensor from ``first`` on; ``piece`` is cast and brought to the CPU."""
        entry = self.entries[name]
        raw = _raw(piece.detach().to("cpu", entry.dtype).contiguous())
        self._sums[name] = zlib.crc32(raw, self._sums[name])
        self._write(raw, entry.start + first * entry.dtype.itemsize)

    def _write(self, view: memoryview, place: int) -> None:
        while len(view):
            done = os.pwrite(self._descriptor, view, place)
            view, place = view[done:], place + done

    @property
    def checksum(self) -> str:
        """What :func:`checksum` will find in the file; to be asked when every tensor is written."""
        return _combined(self._header_sum, self._sums)

    def sync(self) -> None:
        """Wait until the file is on disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def checksum(path: str | Path) -> str:
    """CRC-32 of the header and of every tensor, as one text: against damage, not against forgers.

    By tensor, so that threads can make it while they write; SHA-256 takes twice the time.
    """
    with SafetensorsFile(path) as file:
        end = min((entry.start for entry in file.entries.values()), default=file.path.stat().st_size)
        sums = {}
        for name in file.entries:
            found = 0
            for _, piece in file.pieces(name):
                found = zlib.crc32(_raw(piece), found)
            sums[name] = found
        header = os.pread(file._file.fileno(), end, 0)
    return _combined(zlib.crc32(header), sums)


def _combined(header: int, sums: Mapping[str, int]) -> str:
    text = "".join(f"{name} {found:08x}\n" for name, found in sums.items())
    return f"{header:08x}{zlib.crc32(text.encode()):08x}"
