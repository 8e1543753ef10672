"""The claims' plots: one look for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench.paired import interval


def canvas(columns: int = 1, width: float = 9.0, height: float = 3.6) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def save(figure: Any, path: Path) -> None:
    """Write the PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def differences(axis: Any, rows: Mapping[str, Sequence[float]], label: str) -> None:
    """Paired differences: a dot a seed, the mean and its 95 % interval, a line at none."""
    axis.axvline(0, color="0.6", linewidth=0.8)
    for place, values in enumerate(rows.values()):
        mean, half = interval(values)
        axis.plot(values, [place] * len(values), "o", color="C0", alpha=0.35, markersize=5)
        if np.isfinite(half):
            axis.errorbar(mean, place, xerr=half, fmt="s", color="C0", capsize=4, markersize=5)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(label)


def curves(axis: Any, rows: Mapping[str, Sequence[Sequence[float]]], each: int, label: str) -> None:
    """Means over seeds of series whose values stand for ``each`` steps."""
    for number, (name, series) in enumerate(rows.items()):
        mean = np.mean([values[: min(map(len, series))] for values in series], axis=0)
        color, width = ("black", 2.0) if number == 0 else (f"C{number - 1}", 1.3)
        axis.plot((np.arange(len(mean)) + 0.5) * each, mean, label=name, color=color, linewidth=width)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.grid(True, color="0.92", linewidth=0.6)
    axis.legend(fontsize=7, frameon=False)


def bars(axis: Any, values: Mapping[str, float], label: str) -> None:
    """One bar a name, its value written at the end."""
    names = list(values)
    drawn = axis.barh(names, list(values.values()), color="C0", height=0.6)
    axis.bar_label(drawn, [f" {_figure(value)}" for value in values.values()], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(label)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
