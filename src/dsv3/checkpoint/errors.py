"""What can go wrong with a checkpoint, each as one line a user can act on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from dsv3.common.errors import Failure

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointError(Failure):
    """A checkpoint could not be written: what failed, where, and the way out."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what its manifest says; names the file."""


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn the operating system's refusals (disk full, no permission) into :class:`CheckpointError`."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in _FULL:
            way_out = "free some space or write to another disk; what was there before is untouched"
        else:
            way_out = "choose a folder you may write to"
        raise CheckpointError(f"cannot write {where}: {what}; {way_out}") from error


def some(names: list[str], shown: int = 3) -> str:
    """``a, b, c and 7 more``: the first few of a list, and how many there are besides."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
