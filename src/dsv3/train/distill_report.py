"""What became of the attempts: counts by task and reason, lengths, and two pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from dsv3.evaluate.rejection import LONGER, REASONS, TWICE

Attempt = dict[str, Any]
KEPT = "kept"


def is_right(line: Attempt) -> bool:
    """Passed every filter, kept or not."""
    return line["dropped"] in (None, LONGER, TWICE)


def _lengths(lines: Sequence[Attempt]) -> dict[str, float] | None:
    counts = [line["characters"] for line in lines]
    return {"mean": round(mean(counts), 1), "median": median(counts)} if counts else None


def counts(lines: Sequence[Attempt]) -> dict[str, Any]:
    """Prompts, those with a right answer, attempts, right ones, kept ones, and dropped ones by reason."""
    dropped = Counter(line["dropped"] for line in lines if line["dropped"] is not None)
    return {
        "prompts": len({line["id"] for line in lines}),
        "answered": len({line["id"] for line in lines if is_right(line)}),
        "attempts": len(lines),
        "right": sum(map(is_right, lines)),
        "kept": sum(line["dropped"] is None for line in lines),
        "dropped": {reason: dropped[reason] for reason in REASONS if dropped[reason]},
    }


def summary(lines: Sequence[Attempt]) -> dict[str, Any]:
    """Counts over all and by task; characters of kept, of right and of other answers (mean and median)."""
    names = sorted({str(line["task"] or "file") for line in lines})
    return {
        **counts(lines),
        "characters": {
            KEPT: _lengths([line for line in lines if line["dropped"] is None]),
            "right": _lengths([line for line in lines if is_right(line)]),
            "other": _lengths([line for line in lines if not is_right(line)]),
        },
        "tasks": {
            name: counts([line for line in lines if str(line["task"] or "file") == name]) for name in names
        },
    }


def draw(lines: Sequence[Attempt], folder: Path) -> None:
    """``outcomes.png``: what became of each task's attempts; ``lengths.png``: how long they are."""
    from matplotlib.figure import Figure

    names = sorted({str(line["task"] or "file") for line in lines})
    outcomes = [KEPT, *(reason for reason in REASONS if any(line["dropped"] == reason for line in lines))]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(names)), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(names)
    for outcome in outcomes:
        shares = []
        for name in names:
            own = [line["dropped"] or KEPT for line in lines if str(line["task"] or "file") == name]
            shares.append(own.count(outcome) / len(own))
        axis.barh(names, shares, left=left, label=outcome)
        left = [start + share for start, share in zip(left, shares)]
    axis.set(xlabel="share of attempts", xlim=(0, 1))
    axis.invert_yaxis()
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper left")
    figure.savefig(folder / "outcomes.png")

    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    groups = {
        KEPT: [line["characters"] for line in lines if line["dropped"] is None],
        "right, not kept": [line["characters"] for line in lines if is_right(line) and line["dropped"]],
        "other": [line["characters"] for line in lines if not is_right(line)],
    }
    shown = {name: values for name, values in groups.items() if values}
    axis.hist(list(shown.values()), bins=40, stacked=True, label=list(shown))
    axis.set(xlabel="characters of the answer", ylabel="attempts")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "lengths.png")
