"""The needle's heat maps, as the report draws them: context length across, depth down, green is found."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.common.files import write_atomic
from dsv3.evaluate.needle import scores


def draw(results: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """One map a result, each under its title, side by side in one PNG."""
    from matplotlib.figure import Figure  # drawn without pyplot: no global state, no window system

    tables = [(title, *scores(result)) for title, result in results]
    widths = [1.2 + 0.5 * len(lengths) for _, lengths, _, _ in tables]
    figure = Figure(figsize=(sum(widths) + 1.0, 3.9), layout="constrained", dpi=130)
    axes = figure.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
    image: Any = None
    for axis, (title, lengths, depths, share) in zip(axes, tables):
        image = axis.imshow(100 * share, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        axis.set_xticks(range(len(lengths)), [_length(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
        axis.set_xticks(np.arange(0.5, len(lengths) - 1), minor=True)
        axis.set_yticks(np.arange(0.5, len(depths) - 1), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.8)
        axis.tick_params(which="both", length=0)
        axis.set(title=title, xlabel="context length (tokens)", ylabel="depth of the needle (%)")
    figure.colorbar(image, ax=axes, label="found (%)")
    content = BytesIO()
    figure.savefig(content, format="png")
    write_atomic(path, content.getvalue())


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
