"""Claims 1 and 14: what is counted on the model's code, and what the planner makes of the report's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3.bench.claims.claim import CONTRARY, HOLDS, Claim, Measured, Options
from dsv3.bench.claims.pictures import bars, canvas, save
from dsv3.config.model import ModelConfig
from dsv3.plan.cost import calibrate, report_table
from dsv3.plan.params import counts


def measure_counts(options: Options) -> Measured:
    """Parameters of the released configuration."""
    found = counts(ModelConfig.preset("v3-671b"))
    rows = {
        "main model": (found.main, 671e9),
        "activated a token": (found.activated, 37e9),
        "MTP module": (found.mtp, 11.5e9),
        "in the files": (found.files, 685e9),
    }
    close = all(abs(ours / theirs - 1) < 0.015 for ours, theirs in rows.values())
    return Measured(
        " / ".join(f"{ours / 1e9:.1f}B" for ours, _ in rows.values()),
        HOLDS if close else CONTRARY,
        ("", "counted", "published", "difference"),
        [
            (name, f"{ours:,}", f"{theirs / 1e9:g}B", f"{100 * (ours / theirs - 1):+.2f} %")
            for name, (ours, theirs) in rows.items()
        ],
        {"parts": found.parts, "activated": found.activated_parts},
    )


def draw_counts(data: dict[str, Any], path: Path) -> None:
    """Parameters by part."""
    figure, (left, right) = canvas(2, 10, 3.2)
    bars(left, {part: size / 1e9 for part, size in data["parts"].items()}, "all, billions")
    bars(right, {part: size / 1e9 for part, size in data["activated"].items()}, "activated a token, billions")
    save(figure, path)


def measure_cost(options: Options) -> Measured:
    """The report's table of costs, from one fitted number."""
    rows = report_table(calibrate())
    by_figure = {row["figure"]: row for row in rows}
    hours, money = by_figure["all, H800 hours"], by_figure["all, USD at $2 an hour"]
    return Measured(
        f"{hours['model'] / 1e6:.3f}M hours, ${money['model'] / 1e6:.3f}M",
        HOLDS if abs(hours["error"]) < 0.01 else CONTRARY,
        ("", "planner", "report", "difference", "what it is"),
        [
            (
                row["figure"], f"{row['model']:,.4g}" if row["model"] < 1000 else f"{row['model']:,.0f}",
                f"{row['published']:,}", f"{100 * row['error']:+.1f} %", row["kind"],
            )
            for row in rows
        ],
        {"rows": rows},
    )  # fmt: skip


def draw_cost(data: dict[str, Any], path: Path) -> None:
    """Differences to the report's figures."""
    figure, (axis,) = canvas(1, 8, 2.8)
    bars(axis, {f"{row['figure']} ({row['kind']})": 100 * row["error"] for row in data["rows"]}, "%")
    axis.set_xlabel("planner above the report, %")
    save(figure, path)


COUNTS = Claim(
    1, "counts",
    "671B parameters, 37B activated a token, 11.5B in the MTP module, 685B in the files.",
    "1, 2.2; README_WEIGHTS",
    "the released configuration, built on torch's meta device: every tensor is counted, none is made",
    "Exact: nothing here depends on scale.",
    measure_counts, draw_counts,
)  # fmt: skip

COST = Claim(
    14, "cost",
    "2.788M H800 hours and $5.576M: 2,664K pre-training, 119K context extension, 5K post-training.",
    "1, table 1",
    "`dsv3 plan cost`, the report's layout and machine; the share of peak is fitted to the 180K hours a"
    " trillion tokens, so only the context extension is predicted",
    "A planner that was fitted to a figure agrees with it by construction: the extension's difference is the"
    " test, post-training rests on a guess of its tokens.",
    measure_cost, draw_cost,
)  # fmt: skip
