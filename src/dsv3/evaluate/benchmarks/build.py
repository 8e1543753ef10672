"""A benchmark by its name on the command line."""

from __future__ import annotations

from pathlib import Path

from dsv3.evaluate.benchmarks.base import Benchmark
from dsv3.evaluate.benchmarks.generated import SAMPLES, generated


def build(
    name: str,
    data: Path | None = None,
    samples: int | None = None,
    chat: bool | None = None,
    max_tokens: int = 512,
) -> Benchmark:
    """A generated task, ``NAME`` or ``NAME:DIFFICULTY``.

    ``chat`` None: a conversation for generated tasks. Raises :class:`UserError` for what is unknown.
    """
    return generated(name, samples or SAMPLES, chat=chat is not False, max_tokens=max_tokens)
