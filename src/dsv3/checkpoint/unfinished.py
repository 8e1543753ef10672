"""A folder in the making that outlives its process: files appear one by one, a later call goes on with them.

Beside the target ``X`` lies ``.tmp-convert-X/``: ``model/`` is the folder itself, ``journal.json`` says what
the job is and the checksum of every file that is whole and on disk, and a ``lock``. The last step renames
``model/``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.checkpoint.safetensors_io import checksum
from dsv3.common.errors import UserError
from dsv3.common.files import TEMPORARY, fsync_folder, write_json


class Unfinished:
    """An open one: ``folder`` to write into, ``done`` with the checksum of each whole file."""

    def __init__(self, target: Path, job: dict[str, Any]):
        self.target, self.job = target, job
        self.root = _root(target)
        self.folder = self.root / "model"
        self.done: dict[str, str] = {}

    def begin(self) -> bool:
        """Take up what an earlier call of the same job left; False where that was another job's."""
        was, done = _journal(self.root) or (self.job, {})
        self.done = done if was == self.job else {}
        self.folder.mkdir(exist_ok=True)
        self.tidy()
        self._write()
        return was == self.job

    def tidy(self) -> None:
        """Remove what is not whole."""
        for path in self.folder.iterdir():
            if path.name not in self.done:
                path.unlink()

    def sound(self, file: str) -> bool:
        """Whether a file is what it was when it was added."""
        try:
            return checksum(self.folder / file) == self.done[file]
        except UserError:  # missing, cut short, or its header is damaged
            return False

    def add(self, file: str, checksum: str) -> None:
        """A file is whole and on disk."""
        self.done[file] = checksum
        self._write()

    def drop(self, file: str) -> None:
        """A file is not whole after all."""
        del self.done[file]
        self._write()
        (self.folder / file).unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the folder its name."""
        fsync_folder(self.folder)
        os.rename(self.folder, self.target)
        fsync_folder(self.target.parent)
        shutil.rmtree(self.root, ignore_errors=True)

    def _write(self) -> None:
        write_json(self.root / "journal.json", {"job": self.job, "done": self.done})


@contextlib.contextmanager
def unfinished(target: Path, job: dict[str, Any]) -> Iterator[Unfinished]:
    """Open the unfinished folder of a target, new or not, and keep other processes out of it.

    Raises :class:`UserError` where another process is at it; the lock goes when that process does. What fails
    before any file is whole leaves nothing behind.
    """
    root = _root(target)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{target} is being written by another process; wait for it") from None
        work = Unfinished(target, job)
        try:
            yield work
        except BaseException:
            if work.done:
                work.tidy()
                print(
                    f"{len(work.done)} files are whole, in {root}; the same command goes on from there",
                    file=sys.stderr,
                )
            else:
                shutil.rmtree(root, ignore_errors=True)
            raise


def _root(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}convert-{target.name}")


def _journal(root: Path) -> tuple[Any, dict[str, str]] | None:
    """The job and the files that are whole; None without a journal, no job where it is damaged."""
    try:
        tree = json.loads((root / "journal.json").read_text(encoding="utf-8"))
        return tree["job"], tree["done"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None, {}
