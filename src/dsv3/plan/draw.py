"""Pipeline schedules as a picture: a row a rank, a block an action; beside it what the rank holds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dsv3.common.files import write_atomic
from dsv3.plan.pipeline import Span, Timeline, formula

# kind: (colour, paler colour of the second way through a rank)
COLOURS = {
    "F": ("#4C78A8", "#9DBBD8"),
    "B": ("#54A24B", "#8CC684"),
    "I": ("#54A24B", "#8CC684"),
    "W": ("#E8A33D", "#F4CF95"),
}
NAMES = {"F": "forward F", "B": "backward B (whole, or its input part I)", "W": "weight part W"}
IDLE, DARK = "#E9E9E9", "#222222"
WIDTH = 15.0  # inches


def draw(timelines: list[Timeline], path: str | Path, unit: str = "") -> None:
    """Write a PNG of the schedules, one below the other on one axis of time; ``unit`` labels it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    longest = max(timeline.makespan for timeline in timelines)
    heights = [timeline.schedule.ranks + 1.6 for timeline in timelines]
    figure = Figure(figsize=(WIDTH, 0.34 * sum(heights) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, timeline in zip(axes, timelines):
        _rows(axis, timeline, longest)
    axes[-1].set_xlabel(f"time [{unit}]" if unit else "time", fontsize=10)
    every = [(t, span) for t in timelines for spans in t.spans for span in spans]
    kinds = {job.kind.replace("I", "B") for _, span in every for job in span.action}
    legend = [Patch(color=COLOURS[kind][0], label=NAMES[kind]) for kind in NAMES if kind in kinds]
    if any(any(_returning(*each)) for each in every):
        legend.append(Patch(color=COLOURS["F"][1], label="paler: the other direction, or a later pass"))
    if any(len(span.action) == 2 for _, span in every):
        legend.append(Patch(facecolor="white", edgecolor=DARK, label="framed: F and B overlapped"))
    legend.append(Patch(color=IDLE, label="bubble"))
    figure.legend(
        handles=legend, loc="outside upper left", ncols=len(legend), frameon=False, handlelength=1.2
    )
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    write_atomic(path, data.getvalue())


def _returning(timeline: Timeline, span: Span) -> list[bool]:
    """For each job of a span: whether it goes the other way through its rank (DualPipe, or back up a V)."""
    schedule = timeline.schedule
    if schedule.name == "dualpipe":
        return [job.micro_batch >= schedule.micro_batches // 2 for job in span.action]
    return [job.stage >= schedule.ranks for job in span.action]


def _rows(axis: Any, timeline: Timeline, longest: float) -> None:
    """One schedule: its blocks with their micro-batches' numbers where they fit, its title, its columns."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    schedule, ranks = timeline.schedule, timeline.schedule.ranks
    points_a_unit = 0.86 * WIDTH * 72 / longest
    blocks = [Rectangle((0, rank - 0.43), timeline.makespan, 0.86) for rank in range(ranks)]
    colours, frames = [IDLE] * ranks, []
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            pair, length = len(span.action) == 2, span.end - span.start
            for i, (job, returning) in enumerate(zip(span.action, _returning(timeline, span))):
                height = 0.43 if pair else 0.86
                low = rank - 0.43 + i * height
                blocks.append(Rectangle((span.start, low), length, height))
                colours.append(COLOURS[job.kind][returning])
                label = str(job.micro_batch)
                size = min(6.2 if pair else 7.5, (length * points_a_unit - 1.0) / (0.64 * len(label)))
                if size >= 4:
                    axis.text(
                        span.start + length / 2, low + height / 2 + 0.02, label, ha="center", va="center",
                        fontsize=size, color=DARK if returning or job.kind == "W" else "white",
                    )  # fmt: skip
            if pair:
                frames.append(Rectangle((span.start, rank - 0.43), length, 0.86))
    axis.add_collection(PatchCollection(blocks, facecolors=colours, edgecolors="white", linewidths=0.5))
    axis.add_collection(PatchCollection(frames, facecolors="none", edgecolors=DARK, linewidths=0.8))
    for x, head, values in (
        (1.012, "bubble", timeline.bubbles), (1.065, "held", timeline.activations),
    ):  # fmt: skip
        axis.text(longest * x, -0.75, head, fontsize=8, style="italic", color="#444444")
        for rank, value in enumerate(values):
            axis.text(longest * x, rank, f"{value:.3g}", va="center", fontsize=8, color="#444444")
    known = formula(schedule, timeline.times)
    total, bubble = timeline.makespan, timeline.bubble
    title = f"{schedule.name}: {ranks} ranks, {schedule.micro_batches} micro-batches, time {total:.4g}, "
    title += f"bubble {bubble:.4g} ({100 * bubble / total:.1f}%)"
    title += f"; {known[0]} = {known[1]:.4g}" if known else ""
    axis.set_title(title, loc="left", fontsize=10.5)
    axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(ranks - 0.45, -0.55)
    axis.set_xlim(0, longest)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
