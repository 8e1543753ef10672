"""Refuse a folder that cannot be written before any work starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dsv3.common.errors import UserError


def writable(folder: str | Path, field: str) -> Path:
    """Make a folder and make sure files can be written in it; raises :class:`UserError` naming the field."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{field} ({folder}) cannot be written: {error.strerror}; choose another") from None
    return Path(folder)
