"""Claims 7 and 8: read from the runs of ``dsv3 bench fp8 --ablation``, and those that are missing trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench import paired
from dsv3.bench.claims.claim import Claim, Measured, Options
from dsv3.bench.claims.pictures import canvas, differences, save
from dsv3.bench.claims.spread import above, spread, within
from dsv3.bench.fp8_ablation import GOAL_PERCENT, REFERENCE, SMOOTH, VARIATIONS, gap_percent, variation
from dsv3.bench.paired import Run

FOLDER, DATA, STEPS = Path("runs/fp8-ablation"), "data/tiny", 1000
BLOCKS = "gradient-blocks"


def ran(names: Sequence[str], options: Options) -> list[Run]:
    """These variations from the options' seeds, and from every seed that has them all already."""
    words = {name: variation(name) for name in names}
    there = sorted(int(folder.name.removeprefix("seed-")) for folder in FOLDER.glob("seed-*"))
    whole = [seed for seed in there if all(map(finished, paired.runs_of(words, [seed], FOLDER)))]
    runs = paired.runs_of(words, sorted({*options.seeds, *whole}), FOLDER)
    waiting = [run for run in runs if not finished(run)]
    if waiting:
        paired.check(DATA)
        paired.train(waiting, STEPS, DATA, options.workers, "ablation")
    return runs


def finished(run: Run) -> bool:
    """Whether a run has taken all of its steps."""
    return len(paired.losses(run)) >= STEPS


def gaps(runs: Sequence[Run], name: str, reference: str) -> dict[str, list[float]]:
    """Of each seed: the loss at the end and the held-out bits per byte above the reference's, in percent."""
    found: dict[str, list[float]] = {"seeds": [], "end": [], "held_out": []}
    for run, other in paired.by_name(runs, reference)[name]:
        found["seeds"].append(run.seed)
        found["end"].append(float(gap_percent(paired.losses(run), paired.losses(other))[-1]))
        found["held_out"].append(100 * (paired.held_out(run) / paired.held_out(other) - 1))
    return found


def rows_of(name: str, found: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """A row a seed and one for all."""
    each = [
        (f"{VARIATIONS[name][0]}, seed {seed}", f"{end:+.2f} %", f"{held_out:+.2f} %")
        for seed, end, held_out in zip(*found.values())
    ]
    return [*each, ("**mean and 95 % interval**", spread(found["end"]), spread(found["held_out"]))]


def measure_gap(options: Options) -> Measured:
    """The report's recipe against FP32."""
    found = gaps(ran((REFERENCE, "fp8"), options), "fp8", REFERENCE)
    return Measured(
        f"{spread(found['end'])} at the end, {spread(found['held_out'])} held out ({len(found['seeds'])}"
        " seeds)",
        within(found["end"], GOAL_PERCENT),
        ("against FP32", f"loss, last {SMOOTH} steps", "held-out bits per byte"),
        rows_of("fp8", found),
        {"loss at the end": found["end"], "held-out text": found["held_out"]},
    )


def measure_blocks(options: Options) -> Measured:
    """Gradients in blocks against gradients in tiles, both in FP8."""
    found = gaps(ran(("fp8", BLOCKS), options), BLOCKS, "fp8")
    return Measured(
        f"{spread(found['end'])} at the end, {spread(found['held_out'])} held out; nothing diverges",
        above(found["end"]),
        ("against tiles of 1 x 128", f"loss, last {SMOOTH} steps", "held-out bits per byte"),
        rows_of(BLOCKS, found),
        {"loss at the end": found["end"], "held-out text": found["held_out"]},
    )


def draw(data: dict[str, Any], path: Path) -> None:
    """The differences, a dot a seed."""
    figure, (axis,) = canvas(1, 7, 2.2)
    axis.axvspan(-GOAL_PERCENT, GOAL_PERCENT, color="0.93", label=f"within {GOAL_PERCENT} %")
    differences(axis, data, "above the reference, %")
    axis.set_xlim(*(np.array([-1, 1]) * max(0.5, 1.1 * max(abs(v) for row in data.values() for v in row))))
    axis.legend(fontsize=7, frameon=False)
    save(figure, path)


CONFIGURATION = (
    "the tiny preset without MTP (16M parameters, hidden 192), 1,000 steps of 8 x 128 tokens, the formats,"
    " tiles and scales of the report bit for bit, sums in FP32 (docs/fp8.md)"
)

FP8 = Claim(
    7, "fp8",
    "The loss of FP8 training stays within 0.25 % of BF16's (16B and 230B models).",
    "3.3, appendix B.1",
    f"{CONFIGURATION}; against FP32",
    "A change as small as the order of sums moves single runs by as much as the bound, so few seeds of 1,000"
    " steps do not resolve it; sums of tensor cores are not imitated in these runs.",
    measure_gap, draw,
)  # fmt: skip

FP8_BLOCKS = Claim(
    8, "blocks",
    "Quantising gradients of activations in blocks of 128 x 128 diverges (16B model, 300B tokens).",
    "appendix B.2",
    f"{CONFIGURATION}; gradients in blocks of 128 x 128 against tiles of 1 x 128",
    "Widths of 192 and 128 give few tiles a row, and a million tokens are not 300 billion: what large models"
    " suffer from blocks does not appear.",
    measure_blocks, draw,
)  # fmt: skip
