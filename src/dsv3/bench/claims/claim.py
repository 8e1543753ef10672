"""What a claim is: a figure of the report, our way to measure it, and what such a measurement can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
HOLDS, CONTRARY, OPEN = "holds here", "contrary here", "not resolved"


@dataclass(frozen=True)
class Options:
    """How to measure: small (``fast``) or full runs, from these seeds, so many at once, below ``out``."""

    fast: bool
    seeds: tuple[int, ...]
    workers: int
    out: Path


@dataclass(frozen=True)
class Measured:
    """What came out. ``figure``: in a few words, with its spread; ``verdict``: at this scale.

    ``header`` and ``rows``: the table of the claim's section. ``data``: what its plot is drawn from.
    ``runs``: how large the training runs were, where there were any.
    """

    figure: str
    verdict: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    data: dict[str, Any] = field(default_factory=dict)
    runs: str = ""


@dataclass(frozen=True)
class Claim:
    """One row of docs/claims.md.

    ``says`` and ``where``: the report's words in ours, and its section. ``ours``: our configuration, for the
    fast runs and the full ones. ``limits``: what so small a scale can and cannot show. ``draw`` makes a PNG
    from :attr:`Measured.data`.
    """

    number: int
    name: str
    says: str
    where: str
    ours: str
    limits: str
    measure: Callable[[Options], Measured]
    draw: Callable[[dict[str, Any], Path], None]
