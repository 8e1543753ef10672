"""One progress bar for every long job: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_EVERY = 10.0  # seconds between lines when the output is not a terminal


def human(value: float) -> str:
    """``12345.6`` as ``12.3K``: three digits and a decimal prefix."""
    for unit in ("", "K", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(text: str) -> None:
    """Print a line to the standard error without tearing a bar, whoever shows one."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Progress of a job of ``total`` units, with rate and time left.

    Use as a context manager; ``advance`` moves it, ``note`` sets the text shown beside it and ``line``
    prints something above it. ``done`` is where a resumed job starts (not counted in the rate).
    """

    def __init__(self, title: str, total: float, unit: str = "", done: float = 0):
        self.title, self.total, self.unit = title, total, unit
        self.start_at = self.done = done
        self.text = ""
        self.started = time.monotonic()
        self.last_line = self.started
        self.live: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.live = tqdm(
                total=total, initial=done, desc=title, unit=unit, unit_scale=True,
                dynamic_ncols=True, file=sys.stderr, mininterval=0.2, smoothing=0.1,
            )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.close()
        elif kind is None:
            self._plain()

    def note(self, text: str) -> None:
        """Show ``text`` (the latest loss, say) beside the bar."""
        self.text = text
        if self.live is not None:
            self.live.set_postfix_str(text, refresh=False)

    def line(self, text: str) -> None:
        """Print a line without tearing the bar."""
        say(text)

    def advance(self, amount: float) -> None:
        """``amount`` more units are done."""
        self.done += amount
        if self.live is not None:
            self.live.update(amount)
        elif time.monotonic() - self.last_line >= PLAIN_EVERY:
            self._plain()

    def expect(self, total: float) -> None:
        """``total`` was an estimate: from here on it is this."""
        self.total = total
        if self.live is not None:
            self.live.total = total

    def _plain(self) -> None:
        self.last_line = time.monotonic()
        rate = (self.done - self.start_at) / max(self.last_line - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = f", {duration(left)} left" if 0 < left < 1e8 else ""
        share = f"{100 * self.done / self.total:.0f}%" if self.total else ""
        text = f"  {self.text}" if self.text else ""
        print(
            f"{self.title}: {share} {human(self.done)}/{human(self.total)} {self.unit},"
            f" {human(rate)} {self.unit}/s{eta}{text}",
            file=sys.stderr,
            flush=True,
        )
