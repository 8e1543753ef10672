"""``dsv3 convert``: a Hugging Face folder in another number format, by threads, surviving a kill (3.3).

Every file of the source becomes a file of the same name. Threads draw its tensors in order and write them to
their places; reading, writing and the compiled kernels leave the interpreter to the others.

Memory: no tensor is read whole. A worker holds a band of a tensor's rows (:data:`dsv3.checkpoint.fp8.BAND`
numbers, or 128 rows where that is more) as stored, as FP32 and as written: at most 16 bytes a number, so 4
MiB a worker, 36 MiB where a matrix is 18,432 wide. Beside that the names and places of all tensors, about 4
KB each.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint import hf, names
from dsv3.checkpoint.errors import CheckpointError, writing
from dsv3.checkpoint.fp8 import FP8, outputs, quantization_config, translate
from dsv3.checkpoint.safetensors_io import METADATA, Kind, SafetensorsWriter, nbytes
from dsv3.checkpoint.unfinished import Unfinished, unfinished
from dsv3.checkpoint.weights import Weights
from dsv3.common.errors import UserError, nearest
from dsv3.common.files import sha256, write_atomic
from dsv3.common.progress import Progress, human
from dsv3.model import DeepSeekV3
from dsv3.ops import native

FORMATS = {"fp8": FP8, "bf16": torch.bfloat16, "fp32": torch.float32}
SCALE_FORMATS = ("float", "ue8m0")
MADE_BY = (
    "dsv3-convert/1"  # another number when the same source gives other bytes: then nothing is gone on with
)


@dataclass(frozen=True)
class Result:
    """What a conversion came to. Bytes of tensors read and written by this call, in ``seconds``.

    ``ue8m0_source``: the source's scales are powers of two.
    """

    folder: Path
    files: int
    read_bytes: int
    written_bytes: int
    seconds: float
    ue8m0_source: bool


@dataclass(frozen=True)
class Shard:
    """A file to write: the dtype each of the source's tensors gets, in reading order, and what that makes."""

    file: str
    dtypes: dict[str, torch.dtype]
    kinds: dict[str, Kind]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(map(nbytes, self.kinds.values()))


def convert(
    source: str | Path, target: str | Path, to: str, scale_format: str = "float", workers: int = 2
) -> Result:
    """Write ``target``, a new folder, from ``source`` with the layers' matrices in ``to``: fp8, bf16 or fp32.

    fp8 is the released layout: the other weights are BF16, the experts' biases FP32, as in bf16 too.
    ``scale_format`` ue8m0: new scales are powers of two, as in V3.1. A call that was killed is continued by
    the same call, to the same bytes; where the source or what is asked has changed since, it starts again.

    Raises :class:`UserError` before any work for a source that is not whole or is in ``to`` already, a target
    that exists or too little room; :class:`CheckpointError` for a disk that gets full and for a source that
    changes under way.
    """
    started = time.monotonic()
    source, target = Path(source), Path(target)
    _check(source, target, to, scale_format, workers)
    config = hf.read_config(source)
    ue8m0_source = hf.stored_quantization(source).get("scale_fmt") == "ue8m0"
    ue8m0 = ue8m0_source or scale_format == "ue8m0"
    with Weights(source) as weights:
        model = hf.bare_model(config, weights)
        shards = plan(weights, model, to)
        anew = to == "fp8" and ue8m0 and not ue8m0_source
        if not anew and all(weights.kind(name)[0] is kind for s in shards for name, kind in s.dtypes.items()):
            raise UserError(f"{source} is in {to} already; choose another --to, or copy it")
        job = {
            "made_by": MADE_BY, "to": to, "ue8m0": ue8m0,
            "source": weights.state(), "config": sha256(source / "config.json"),
        }  # fmt: skip
        with writing(target), unfinished(target, job) as work:
            left = _go_on(work, shards, workers)
            needed, free = sum(shard.nbytes for shard in left), shutil.disk_usage(work.folder).free
            if needed > free:
                raise UserError(f"{target} needs {human(needed)}B, the disk has {human(free)}B free")
            _Threads(weights, work, left, ue8m0, anew).run(workers)
            _write_rest(
                work.folder, source, model, shards, quantization_config(ue8m0) if to == "fp8" else None
            )
            work.finish()
    read = sum(weights.entries[name].size for shard in left for name in shard.dtypes)
    written = sum(shard.nbytes for shard in left)
    return Result(target, len(shards), read, written, time.monotonic() - started, ue8m0_source)


def plan(weights: Weights, model: DeepSeekV3, to: str) -> list[Shard]:
    """What each file will hold; a file that only held scales is no more."""
    in_fp8 = names.quantised(model) if to == "fp8" else set()
    other = torch.bfloat16 if to == "fp8" else FORMATS[to]
    files: dict[str, dict[str, torch.dtype]] = {}
    for name in weights.in_order():
        kind = FP8 if name in in_fp8 else torch.float32 if names.always_fp32(name) else other
        files.setdefault(weights.file_of(name).path.name, {})[name] = kind
    shards = []
    for file, dtypes in files.items():
        kinds: dict[str, Kind] = {}
        for name, kind in dtypes.items():
            kinds.update(outputs(name, weights.entries[name].shape, kind))
        shards.append(Shard(file, dtypes, kinds))
    return shards


def _check(source: Path, target: Path, to: str, scale_format: str, workers: int) -> None:
    for option, value, known in (("--to", to, [*FORMATS]), ("--scale-format", scale_format, SCALE_FORMATS)):
        if value not in known:
            raise UserError(
                f"{option} ({value}) is unknown{nearest(value, known)}; there are {', '.join(known)}"
            )
    if scale_format == "ue8m0" and to != "fp8":
        raise UserError(f"--scale-format (ue8m0) is for --to fp8; {to} has no scales")
    if workers < 1:
        raise UserError(f"--workers ({workers}) must be at least 1")
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give the local folder of a Hugging Face checkpoint")
    if target.exists():
        raise UserError(f"{target} already exists; choose a new folder or delete it first")


def _go_on(work: Unfinished, shards: list[Shard], workers: int) -> list[Shard]:
    """What is left to write, each file that an earlier call left having been read and compared."""
    if not work.begin():
        print(
            f"starting again: {work.target} was begun from other files or in another format", file=sys.stderr
        )
    kept = [shard for shard in shards if shard.file in work.done]
    if kept:
        total = sum(shard.nbytes for shard in kept)
        with Progress("check what is there", total, "B") as progress, ThreadPoolExecutor(workers) as pool:
            for shard, sound in zip(kept, pool.map(work.sound, [shard.file for shard in kept])):
                if not sound:
                    progress.line(f"{shard.file} is damaged: it is written again")
                    work.drop(shard.file)
                progress.advance(shard.nbytes)
    return [shard for shard in shards if shard.file not in work.done]


class _Open:
    """A file in the making; ``left`` of its tensors are still to be written."""

    def __init__(self, shard: Shard, folder: Path):
        self.name, self.left = shard.file, len(shard.dtypes)
        self.writer = SafetensorsWriter(folder / shard.file, shard.kinds, METADATA)


class _Stopped(Exception):
    """Another thread has failed, or the user wants to stop."""


class _Threads:
    """Threads that draw tensors in order and write them; who writes a file's last sees it to the disk."""

    def __init__(self, weights: Weights, work: Unfinished, shards: list[Shard], ue8m0: bool, anew: bool):
        self.weights, self.work, self.ue8m0, self.anew = weights, work, ue8m0, anew
        self.total = sum(weights.entries[name].size for shard in shards for name in shard.dtypes)
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.open: dict[str, _Open] = {}
        self.tasks = self._tasks(shards)

    def run(self, workers: int) -> None:
        """Write everything; what is whole stays for the next call where this one fails."""
        native.library()  # compiled by one thread
        try:
            with (
                Progress("convert", self.total, "B") as self.progress,
                _one_thread_each(),
                ThreadPoolExecutor(workers) as pool,
            ):
                futures = [pool.submit(self._thread) for _ in range(workers)]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    self.stop.set()
                    raise
        finally:
            for file in self.open.values():
                file.writer.close()

    def _tasks(self, shards: list[Shard]) -> Iterator[tuple[_Open, str, torch.dtype]]:
        for shard in shards:
            file = self.open[shard.file] = _Open(shard, self.work.folder)
            for name, dtype in shard.dtypes.items():
                yield file, name, dtype

    def _thread(self) -> None:
        try:
            while not self.stop.is_set():
                with self.lock:
                    task = next(self.tasks, None)
                if task is None:
                    return
                self._translate(*task)
        except _Stopped:
            return
        except BaseException:
            self.stop.set()
            raise

    def _translate(self, file: _Open, name: str, dtype: torch.dtype) -> None:
        put = partial(self._put, file.writer)
        translate(name, self.weights.kind(name), dtype, self.weights.rows, put, self.ue8m0, self.anew)
        with self.lock:
            self.progress.advance(self.weights.entries[name].size)
            file.left -= 1
            last = file.left == 0
        if last:
            self._finish(file)

    def _put(self, writer: SafetensorsWriter, name: str, first: int, piece: Tensor) -> None:
        if self.stop.is_set():
            raise _Stopped
        writer.put(name, first, piece)

    def _finish(self, file: _Open) -> None:
        file.writer.sync()
        if self.weights.state() != self.work.job["source"]:
            raise CheckpointError(
                f"{self.weights.folder} changed while it was read; run the same command again"
            )
        with self.lock:
            self.open.pop(file.name).writer.close()
            self.work.add(file.name, file.writer.checksum)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch and the kernels from starting threads of their own inside each of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_rest(
    folder: Path, source: Path, model: DeepSeekV3, shards: list[Shard], quantization: dict[str, object] | None
) -> None:
    where = {name: shard.file for shard in shards for name in shard.kinds}
    dtype = next(shard.dtypes["lm_head.weight"] for shard in shards if "lm_head.weight" in shard.dtypes)
    hf.write_rest(folder, model.config, dtype, quantization, where, sum(shard.nbytes for shard in shards))
    for name in (*hf.TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            write_atomic(folder / name, (source / name).read_bytes())
