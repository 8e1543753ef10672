"""Time a rank spent waiting for others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """``seconds`` that all blocks under :meth:`waiting` took; ``what`` the one that failed did."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.what = ""

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the block, which does ``what``."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError:
            self.what = what
            raise
        finally:
            self.seconds += time.perf_counter() - started
