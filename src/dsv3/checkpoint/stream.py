"""A folder's files made by threads, tensor by tensor, surviving a kill: what ``convert`` and ``init`` share.

Threads draw tasks in order and write what they make to its place in the file; reading, writing and the
compiled kernels leave the interpreter to the others. What is whole when a process dies stays for the next
call with the same job.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.errors import writing
from dsv3.checkpoint.fp8 import Put
from dsv3.checkpoint.safetensors_io import METADATA, Kind, SafetensorsWriter, nbytes
from dsv3.checkpoint.unfinished import Unfinished, unfinished
from dsv3.common.errors import UserError
from dsv3.common.progress import Progress, human
from dsv3.ops import native


@dataclass(frozen=True)
class Task:
    """What one thread makes: a tensor, or a weight with its scales, each from its beginning to its end.

    ``reads``: bytes of the source that it takes.
    """

    make: Callable[[Put], None]
    reads: int = 0


@dataclass(frozen=True)
class Shard:
    """A file to write: its tensors, and the tasks that make them."""

    file: str
    kinds: dict[str, Kind]
    tasks: list[Task]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(map(nbytes, self.kinds.values()))


def write_folder(
    target: Path,
    job: dict[str, Any],
    title: str,
    shards: list[Shard],
    workers: int,
    finish: Callable[[Path], None],
    unchanged: Callable[[], None] = lambda: None,
) -> list[Shard]:
    """Make a new folder of these files and what ``finish`` adds; returns the files made by this call.

    ``job`` (plain data) says what the folder is made from: a call that was killed is continued by a call with
    the same one. ``unchanged`` raises where the source has changed meanwhile. Raises :class:`UserError` for
    too little room and :class:`CheckpointError` where the disk refuses.
    """
    with writing(target), unfinished(target, job) as work:
        left = _go_on(work, shards, workers)
        needed, free = sum(shard.nbytes for shard in left), shutil.disk_usage(work.folder).free
        if needed > free:
            raise UserError(f"{target} needs {human(needed)}B, the disk has {human(free)}B free")
        _Threads(work, left, unchanged).run(title, workers)
        finish(work.folder)
        work.finish()
    return left


def refuse_target(target: Path, workers: int) -> None:
    """Refuse, before any work, a folder that exists and a number of threads that is none."""
    if workers < 1:
        raise UserError(f"--workers ({workers}) must be at least 1")
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
    """A file in the making; ``left`` of its tasks are still to be done."""

    def __init__(self, shard: Shard, folder: Path):
        self.name, self.left = shard.file, len(shard.tasks)
        self.writer = SafetensorsWriter(folder / shard.file, shard.kinds, METADATA)


class _Stopped(Exception):
    """Another thread has failed, or the user wants to stop."""


class _Threads:
    """Threads that draw tasks in order; who does a file's last sees it to the disk."""

    def __init__(self, work: Unfinished, shards: list[Shard], unchanged: Callable[[], None]):
        self.work, self.unchanged = work, unchanged
        self.total = sum(shard.nbytes for shard in shards)
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.open: dict[str, _Open] = {}
        self.tasks = self._tasks(shards)

    def run(self, title: str, workers: int) -> None:
        """Write everything; what is whole stays for the next call where this one fails."""
        native.library("quantise")  # compiled by one thread
        try:
            with (
                Progress(title, self.total, "B") as self.progress,
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

    def _tasks(self, shards: list[Shard]) -> Iterator[tuple[_Open, Task]]:
        for shard in shards:
            file = self.open[shard.file] = _Open(shard, self.work.folder)
            for task in shard.tasks:
                yield file, task

    @torch.no_grad()
    def _thread(self) -> None:
        try:
            while not self.stop.is_set():
                with self.lock:
                    drawn = next(self.tasks, None)
                if drawn is None:
                    return
                file, task = drawn
                task.make(partial(self._put, file.writer))
                with self.lock:
                    file.left -= 1
                    last = file.left == 0
                if last:
                    self._finish(file)
        except _Stopped:
            return
        except BaseException:
            self.stop.set()
            raise

    def _put(self, writer: SafetensorsWriter, name: str, first: int, piece: Tensor) -> None:
        if self.stop.is_set():
            raise _Stopped
        writer.put(name, first, piece)
        with self.lock:
            self.progress.advance(piece.numel() * writer.entries[name].dtype.itemsize)

    def _finish(self, file: _Open) -> None:
        file.writer.sync()
        self.unchanged()
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
