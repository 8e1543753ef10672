"""Pictures of a run, drawn from ``metrics.jsonl``: loss, schedules, expert load over time, MaxVio."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.train.run import RunFolder, read_lines
from dsv3.train.trainer import Callback, StepReport, Trainer

EVERY_SECONDS = 120.0  # between drawings while the run goes on
COLUMNS = 240  # time steps a heat map is averaged to


def _column(lines: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([line[key] for line in lines], dtype=float)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean of the last ``width`` values, shorter at the beginning."""
    values = np.where(np.isfinite(values), values, np.nanmean(values[np.isfinite(values)]))
    total = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (total[ends] - total[starts]) / (ends - starts)


def blank(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure in the house's style, of a size in inches, and its axes ``[rows, columns]``."""
    from matplotlib.figure import Figure  # drawn without pyplot: no global state, no window system
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(True, color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1.5M tokens
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_loss(steps: list[dict[str, Any]], checks: list[dict[str, Any]], path: Path) -> None:
    """Main and MTP training loss, and held-out bits per byte, against tokens."""
    figure, axes = blank(1, 2, 10, 3.8)
    tokens = _column(steps, "tokens")
    width = max(1, len(steps) // 50)
    left, right = axes[0]
    loss = _column(steps, "loss")
    left.plot(tokens, loss, color="C0", alpha=0.25, linewidth=0.8)
    depths = max((len(line.get("mtp_loss", ())) for line in steps), default=0)
    predicts = any(
        "mtp_loss" in line for line in steps
    )  # tokens; rewards and policies have losses of their own
    left.plot(tokens, _smooth(loss, width), color="C0", label="next token" if predicts else "loss")
    for depth in range(depths):
        kept = [line for line in steps if len(line.get("mtp_loss", ())) > depth]
        values = np.array([line["mtp_loss"][depth] for line in kept])
        name = "MTP" if depths == 1 else f"MTP depth {depth + 1}"
        color = f"C{depth + 1}"
        left.plot(_column(kept, "tokens"), _smooth(values, width), color, label=name, linewidth=1.2)
    left.set(xlabel="tokens", ylabel="training loss (nats a token)" if predicts else "training loss")
    left.legend(frameon=False)
    if checks:
        right.plot(_column(checks, "tokens"), _column(checks, "validation_bits_per_byte"), marker="o", ms=3)
        right.set(xlabel="tokens", ylabel="held-out bits per byte")
        if checks[-1].get("mtp_acceptance"):
            twin = right.twinx()
            share = [100 * line["mtp_acceptance"][0] for line in checks]
            twin.plot(_column(checks, "tokens"), share, color="tab:orange", marker="s", ms=3)
            twin.set_ylabel("MTP acceptance (%)", color="tab:orange")
            twin.spines["top"].set_visible(False)
    figure.savefig(path)


def draw_schedules(steps: list[dict[str, Any]], path: Path) -> None:
    """Learning rate, batch, gamma and lambda as they were applied."""
    names = {
        "lr": "learning rate", "batch_sequences": "sequences a step",
        "gamma": "bias step gamma", "mtp_weight": "MTP weight lambda",
    }  # fmt: skip
    names = {key: name for key, name in names.items() if key in steps[-1]}
    figure, axes = blank(1, len(names), 3.25 * len(names), 2.8)
    for axis, (key, name) in zip(axes[0], names.items()):
        axis.plot(_column(steps, "tokens"), _column(steps, key))
        axis.set(xlabel="tokens", title=name)
        axis.set_ylim(bottom=0)
    figure.savefig(path)


def _loads(steps: list[dict[str, Any]], layer: str) -> np.ndarray:
    """Load of a layer's experts over time, 1 = even: ``[E, at most COLUMNS]``."""
    load = np.array([line["expert_load"][layer] for line in steps if layer in line["expert_load"]], float)
    groups = np.array_split(load, min(COLUMNS, len(load)))
    summed = np.array([group.sum(axis=0) for group in groups])
    return (summed / summed.mean(axis=1, keepdims=True)).T


def _names(steps: list[dict[str, Any]], layers: list[str]) -> dict[str, str]:
    """What a picture calls each layer; those of the MTP modules follow the main model's."""
    modules = len(steps[-1].get("mtp_loss", ()))
    main = len(layers) - modules
    return {layer: f"layer {layer}" + " (MTP)" * (i >= main) for i, layer in enumerate(layers)}


def draw_expert_load(steps: list[dict[str, Any]], path: Path, most: int = 6) -> None:
    """Heat map of every expert's load over time, a panel a layer (evenly chosen if there are many)."""
    layers = sorted(steps[-1]["expert_load"], key=int)
    if not layers:
        return
    names = _names(steps, layers)
    chosen = [layers[i] for i in sorted(set(np.linspace(0, len(layers) - 1, most).round().astype(int)))]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = blank(rows, columns, 4.2 * columns, 2.4 * rows + 0.4)
    last = float(steps[-1]["tokens"])
    image = None
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis, layer in zip(axes.flat, chosen):
        load = _loads(steps, layer)
        image = axis.imshow(
            load, aspect="auto", origin="lower", vmin=0, vmax=2, cmap="RdBu_r", interpolation="nearest",
            extent=(0, last, -0.5, len(load) - 0.5),
        )  # fmt: skip
        axis.grid(False)
        axis.set(title=names[layer], xlabel="tokens", ylabel="expert")
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="load / mean load", shrink=0.8)
    figure.savefig(path)


def draw_max_violation(steps: list[dict[str, Any]], path: Path) -> None:
    """MaxVio of every layer over time, of single steps, smoothed."""
    layers = sorted(steps[-1]["max_violation"], key=int)
    if not layers:
        return
    names = _names(steps, layers)
    figure, axes = blank(1, 1, 6.5, 3.6)
    axis = axes[0, 0]
    width = max(1, len(steps) // 50)
    for layer in layers:
        kept = [line for line in steps if layer in line["max_violation"]]
        values = np.array([line["max_violation"][layer] for line in kept], float)
        axis.plot(_column(kept, "tokens"), _smooth(values, width), label=names[layer], linewidth=1.2)
    axis.set(xlabel="tokens", ylabel="MaxVio (busiest expert / mean - 1)")
    axis.set_ylim(bottom=0)
    if len(layers) <= 12:
        axis.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path)


def draw(run: Path) -> list[Path]:
    """Draw all pictures of a run folder into ``plots/``; returns their paths."""
    source = run / "metrics.jsonl"
    if not source.exists():
        return []
    lines = read_lines(source)
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation_bits_per_byte" in line]
    if not steps:
        return []
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    draw_loss(steps, checks, folder / "loss.png")
    draw_schedules(steps, folder / "schedules.png")
    draw_expert_load(steps, folder / "expert_load.png")
    draw_max_violation(steps, folder / "max_violation.png")
    return sorted(folder.glob("*.png"))


class Plots(Callback):
    """Draws now and then, and at the end. ``draw``: of a run's folder, gives the pictures' paths."""

    def __init__(self, run: RunFolder, draw: Callable[[Path], list[Path]] = draw):
        self.run, self.draw = run, draw
        self.last = time.monotonic()

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """When two minutes have passed since the last drawing."""
        if time.monotonic() - self.last > EVERY_SECONDS:
            self.draw(self.run.path)
            self.last = time.monotonic()

    def on_end(self, trainer: Trainer) -> None:
        """The whole run."""
        self.draw(self.run.path)
