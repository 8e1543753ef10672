"""Claim 5: what a second head that predicts one token further does to the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench.claims import training
from dsv3.bench.claims.claim import Claim, Measured, Options
from dsv3.bench.claims.pictures import canvas, differences, save
from dsv3.bench.claims.spread import below, spread
from dsv3.bench.claims.training import BASE, LONGER

WITHOUT = "no-mtp"


def measure(options: Options) -> Measured:
    """The baseline, which has a module, against none for as many tokens and for as many FLOPs."""
    found = training.gathered(training.trained((BASE, WITHOUT, LONGER), options), options)
    tokens, flops = (training.changes(found, BASE, name) for name in (WITHOUT, LONGER))
    more = found[LONGER]["steps"] / found[WITHOUT]["steps"]
    return Measured(
        f"with MTP {spread(tokens)} bits per byte at equal tokens, {spread(flops)} at equal FLOPs",
        f"equal tokens: {below(tokens)}; equal FLOPs: {below(flops)}",
        ("trained", "steps", "held-out bits per byte of the main head", "MTP against it (95 %)"),
        [
            (
                row["what"] if name != BASE else "with MTP, lambda 0.3, then 0.1", f"{row['steps']:,}",
                f"{np.mean(row['bits_per_byte']):.4f}",
                spread(training.changes(found, BASE, name)) if name != BASE else "",
            )
            for name, row in found.items()
        ]
        + [(f"FLOPs a token without: 1 / {more:.2f}", "", "", "")],
        {"variations": found},
        training.size(options),
    )  # fmt: skip


def draw(data: dict[str, Any], path: Path) -> None:
    """The two differences."""
    found = data["variations"]
    figure, (axis,) = canvas(1, 7, 2.2)
    rows = {found[name]["what"]: training.changes(found, BASE, name) for name in (WITHOUT, LONGER)}
    differences(axis, rows, "held-out bits per byte with MTP above those without, %")
    save(figure, path)


MTP = Claim(
    5, "mtp",
    "Training a module that predicts the token after the next makes the main model better on most"
    " benchmarks.",
    "4.5.1, table 4",
    "the recipe, which has one module, against none for as many tokens, and for as many FLOPs: equal time"
    " on a machine that does nothing else; held-out text is read by the main head alone",
    "With one expert layer in four the module is a fifth of the model and its loss is felt as a second"
    " task; the report's is one layer in 62. A loss here says nothing against it there.",
    measure, draw,
)  # fmt: skip
