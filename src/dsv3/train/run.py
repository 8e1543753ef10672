"""A run folder: ``recipe.yaml``, ``metrics.jsonl``, ``samples.jsonl``, ``log.txt``, plots, checkpoints."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dsv3.common.errors import UserError
from dsv3.common.files import write_atomic
from dsv3.common.progress import Progress
from dsv3.config import recipe as recipes


class RunFolder:
    """Where a run writes. Lines are flushed as they are written: a killed run loses at most the last one.

    Of several processes the first ``writes``; to the others the methods do nothing but check.
    """

    def __init__(self, path: str | Path, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.progress: Progress | None = None

    def begin(self, recipe: BaseModel, *, resume: bool) -> None:
        """Make the folder and write the resolved recipe; a folder that holds a run needs ``resume``.

        Raises :class:`UserError` too for a folder that another process is writing.
        """
        if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()) and not resume:
            raise UserError(
                f"out ({self.path}) already holds a run: go on with --resume auto, or choose another --out"
            )
        if not self.writes:
            return
        for folder in (self.path, self.checkpoints, self.plots):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"out ({self.path}) cannot be made: {error.strerror}") from None
        self._claim()
        write_atomic(self.path / "recipe.yaml", recipes.dump(recipe))

    def _claim(self) -> None:
        """Keep other processes out until this one ends; the system lets go of it then, however it ends."""
        held = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)  # never closed: that would let go
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
                raise UserError(
                    f"out ({self.path}) is written by another process now: let it end, or give another --out"
                ) from None

    def rewind(self, step: int) -> None:
        """Drop the lines written after ``step``: the run goes on from there."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if self.writes and path.exists():
                kept = [line for line in read_lines(path) if line.get("step", 0) <= step]
                write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _append(self, name: str, text: str) -> None:
        if not self.writes:
            return
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def metric(self, record: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        self._append("metrics.jsonl", json.dumps(record))

    def sample(self, record: dict[str, Any]) -> None:
        """One line of ``samples.jsonl``."""
        self._append("samples.jsonl", json.dumps(record, ensure_ascii=False))

    def log(self, text: str) -> None:
        """A line for people: ``log.txt``, and above the progress bar."""
        if not self.writes:
            return
        stamp = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        self._append("log.txt", f"{stamp}  {text}")
        if self.progress is not None:
            self.progress.line(text)
        else:
            print(text, file=sys.stderr, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON line of a file; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
