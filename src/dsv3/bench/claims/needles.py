"""Claim 12: read from the answers of ``dsv3 niah`` before the extension and after each of its phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench.claims.claim import CONTRARY, HOLDS, OPEN, Claim, Measured, Options
from dsv3.common.errors import UserError
from dsv3.evaluate.needle import scores
from dsv3.evaluate.needle_plot import draw as draw_maps

FOLDER = Path("runs/niah-needle")  # its own, so that other models' answers do not mix with it
GREEN = 0.95  # share found


def measure(options: Options) -> Measured:
    """The share found by length, of every model that was asked."""
    files = sorted(FOLDER.glob("*.json"))
    if len(files) < 2:
        raise UserError(
            f"claim needles reads {FOLDER}, where fewer than two models have answered: give `--out {FOLDER}`"
            " to dsv3 niah in docs/long-context.md"
        )
    results = [(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    rows, means = [], []
    for name, result in results:
        lengths, _, share = scores(result)
        found = np.nanmean(share, axis=0)
        means.append(found)
        cells = ", ".join(f"{length:,}: {part:.0%}" for length, part in zip(lengths, found))
        rows.append((name, f"{np.nanmean(share):.0%}", f"{np.nanmin(share):.0%}", cells))
    first, last = means[0], means[-1]
    green = bool((last >= GREEN).all())
    return Measured(
        f"{rows[0][0]} finds {rows[0][1]} over the grid, {rows[-1][0]} {rows[-1][1]}, at the longest"
        f" {first[-1]:.0%} and {last[-1]:.0%}",
        HOLDS if green and first[-1] < GREEN else OPEN if last[-1] > first[-1] else CONTRARY,
        ("model", "found", "worst cell", "by length in tokens"),
        rows,
        {"results": results},
    )


def draw(data: dict[str, Any], path: Path) -> None:
    """The maps, side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_maps([(name, result) for name, result in data["results"]], path)


NEEDLES = Claim(
    12, "needles",
    "Two phases of YaRN extend the context from 4K to 128K; the needle is found at every depth up to there.",
    "4.3, figure 8",
    "a model small enough to be trained for it, extended by the same two phases on documents of that length"
    " (docs/long-context.md)",
    "Looking up one of a few values is the easiest use of a long context; it shows positions work, not"
    " that the text is understood.",
    measure, draw,
)  # fmt: skip
