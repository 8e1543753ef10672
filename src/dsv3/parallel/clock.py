"""Time a rank spent waiting for others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """``seconds`` that all blocks under :meth:`waiting` took; ``what`` the innermost that failed did."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.what = ""

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the block, which does ``what``."""
        started = time.perf_counter()
        try:
            with self.within(what):
                yield
        finally:
            self.seconds += time.perf_counter() - started

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        """A block that computes too: named where it fails, not counted."""
        try:
            yield
        except RuntimeError:
            self.what = self.what or what
            raise
