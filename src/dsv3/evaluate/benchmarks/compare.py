"""Two models on the same questions: the difference of their scores, question by question.

What both find easy or hard cancels in a paired difference, so its interval is narrower than those of the two
scores would suggest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3.common.errors import UserError
from dsv3.evaluate.benchmarks.run import read_records
from dsv3.evaluate.benchmarks.statistics import mean, paired


def compare(first: Path, second: Path) -> list[dict[str, Any]]:
    """A row for each task and score that two folders of :func:`dsv3.evaluate.benchmarks.run.run` share.

    ``difference``: mean of second minus first over the ``n`` questions both have answered; ``low``, ``high``:
    its 95 % interval (normal approximation: rough below some 30 questions), None for a single question.
    ``up``, ``down``: questions whose score rose or fell. Raises :class:`UserError` where nothing is shared.
    """
    for folder in (first, second):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give two that dsv3 eval --tasks wrote")
    rows = []
    for path in sorted(first.glob("*.jsonl")):
        if not (second / path.name).is_file():
            continue
        head, before = read_records(path)
        _, after = read_records(second / path.name)
        later = {record["digest"]: record["scores"] for record in after}
        pairs = [(one["scores"], later[one["digest"]]) for one in before if one["digest"] in later]
        for name in pairs[0][0] if pairs else ():
            old, new = ([side[name] for side in column] for column in zip(*pairs))
            change = paired(old, new)
            low, high = change.interval if change.stderr is not None else (None, None)
            rows.append(
                {
                    "task": head["task"], "score": name, "n": change.n,
                    "first": mean(old).value, "second": mean(new).value,
                    "difference": change.value, "low": low, "high": high,
                    "up": sum(b > a for a, b in zip(old, new)), "down": sum(b < a for a, b in zip(old, new)),
                }
            )  # fmt: skip
    if not rows:
        raise UserError(
            f"{first} and {second} share no answered question: give two folders that dsv3 eval --tasks wrote"
        )
    return rows


def certain(row: dict[str, Any]) -> bool:
    """Whether the interval leaves zero out."""
    return row["low"] is not None and (row["low"] > 0 or row["high"] < 0)


def draw(rows: list[dict[str, Any]], first: str, second: str, path: Path) -> None:
    """Differences with their intervals, one line a task and score; those that leave zero out are filled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.35 * len(rows)), constrained_layout=True)
    for place, row in enumerate(reversed(rows)):
        half = 0.0 if row["low"] is None else row["high"] - row["difference"]
        sure = certain(row)
        axes.errorbar(
            row["difference"], place, xerr=half, fmt="o", capsize=3, color="C0" if sure else "0.5",
            markerfacecolor="C0" if sure else "white",
        )  # fmt: skip
    labels = [f"{row['task']} {row['score']} (n={row['n']})" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels)
    axes.locator_params(axis="x", nbins=6)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel(f"{second} minus {first}, 95 % interval")
    figure.savefig(path, dpi=120)
    plt.close(figure)
