"""The page's two pictures: accuracy by stage, and what GRPO's steps did."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from dsv3.bench.end_to_end.figures import STAGES, WATCHED
from dsv3.bench.end_to_end.stages import CONTROL
from dsv3.train.callbacks.plots import blank


def draw_accuracy(found: dict[str, Any], path: Path) -> None:
    """A panel a task: the mean of the seeds at each stage, every seed a point; the control's mean a cross."""
    tasks = list(found["accuracy"])
    figure, axes = blank(1, len(tasks), 2.9 * len(tasks), 3.2)
    places = range(len(STAGES))
    for number, (axis, task) in enumerate(zip(axes[0], tasks)):
        rows = [[100 * value for value in found["accuracy"][task][stage]] for stage in STAGES]
        for place, row in zip(places, rows):
            axis.plot([place] * len(row), row, "o", color="0.55", ms=3.5)
        axis.plot(places, [mean(row) for row in rows], color=f"C{number}", marker="_", ms=12, linewidth=1.5)
        control = mean(100 * value for value in found["accuracy"][task]["control"])
        axis.plot(list(STAGES).index("again"), control, "x", color="0.2", label=CONTROL["control"])
        axis.set_xticks(places, STAGES.values(), rotation=30, ha="right", fontsize=8)
        axis.set(title=f"{task} ({found['questions'][task]})", ylim=(-2, 102))
    axes[0, 0].set_ylabel("held-out accuracy (%)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def draw_watched(found: dict[str, Any], path: Path) -> None:
    """A panel a quantity: every seed a line, over GRPO's steps."""
    figure, axes = blank(1, len(WATCHED), 2.9 * len(WATCHED), 2.8)
    for axis, (name, title) in zip(axes[0], WATCHED.items()):
        for seed, values in zip(found["seeds"], found["watched"][name]):
            axis.plot(range(1, len(values) + 1), values, linewidth=1, label=f"seed {seed}")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("steps")
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
