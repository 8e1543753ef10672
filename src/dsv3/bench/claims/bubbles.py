"""Claim 10: bubbles by formula, in the simulation, and in a traced run of real processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsv3.bench import pipeline
from dsv3.bench.claims.claim import CONTRARY, HOLDS, Claim, Measured, Options
from dsv3.bench.claims.pictures import canvas, save
from dsv3.plan.pipeline import Times, formula, simulate
from dsv3.plan.schedules import schedule

NAMES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
RANKS = (4, 8, 16)
TIMES = Times(forward=1.0, backward=2.0, weight=1.0)  # F = I = W, where every formula of the report is exact
TRACED = ("1f1b", "dualpipev")


def measure(options: Options) -> Measured:
    """Every schedule of the report's table at three depths, then two of them run."""
    bubbles: dict[str, dict[str, dict[str, float]]] = {}
    for name in NAMES:
        for ranks in RANKS:
            order = schedule(name, ranks, 2 * ranks)
            known = formula(order, TIMES)
            assert known is not None, name
            found = simulate(order, TIMES)
            bubbles.setdefault(name, {})[str(ranks)] = {"formula": known[1], "simulated": found.bubble}
    exact = all(
        math.isclose(row["formula"], row["simulated"], abs_tol=1e-9)
        for by_ranks in bubbles.values()
        for row in by_ranks.values()
    )
    ran = pipeline.bench(list(TRACED), 2, 8, 3 if options.fast else 10, options.out / "bubbles" / "trace")
    ours = ran["ours"]
    deepest = {name: by_ranks[str(RANKS[-1])]["simulated"] for name, by_ranks in bubbles.items()}
    traced = ", ".join(
        f"{name} {row['step_ms'] / row['simulated_ms']:.2f} times its simulation"
        for name, row in ours.items()
    )
    return Measured(
        f"formula and simulation {'equal' if exact else 'differ'}; at 16 ranks DualPipe"
        f" {deepest['dualpipe']:g}, ZB1P {deepest['zb1p']:g}, 1F1B {deepest['1f1b']:g} forwards of waiting;"
        f" traced: {traced}",
        HOLDS if exact and deepest["dualpipe"] < deepest["zb1p"] < deepest["1f1b"] else CONTRARY,
        ("schedule", "ranks", "formula", "simulated", "traced on 2 ranks: bubble of the step, simulated"),
        [
            (
                name, ranks, f"{row['formula']:g}", f"{row['simulated']:g}",
                f"{ours[name]['bubble_share']:.1%}, {ours[name]['simulated_bubble_share']:.1%}"
                if name in ours and ranks == str(RANKS[0]) else "",
            )
            for name, by_ranks in bubbles.items()
            for ranks, row in by_ranks.items()
        ],
        {"bubbles": bubbles, "traced": ours},
    )  # fmt: skip


def draw(data: dict[str, Any], path: Path) -> None:
    """Simulated bubbles on the lines of the formulas."""
    figure, (axis,) = canvas(1, 6.5, 3.0)
    for number, (name, by_ranks) in enumerate(data["bubbles"].items()):
        ranks = [int(count) for count in by_ranks]
        axis.plot(ranks, [row["formula"] for row in by_ranks.values()], color=f"C{number}", label=name)
        axis.plot(
            ranks,
            [row["simulated"] for row in by_ranks.values()],
            "o",
            color=f"C{number}",
            markersize=9 - 2 * number,
        )
    axis.set_xticks(ranks)
    axis.set_xlabel("ranks (line: formula, dots: simulation)")
    axis.set_ylabel("bubble, forwards of a stage")
    axis.legend(fontsize=8, frameon=False)
    save(figure, path)


BUBBLES = Claim(
    10, "bubbles",
    "DualPipe waits (P/2 - 1)(F&B + B - 3W), ZB1P (P - 1)(F + B - 2W), 1F1B (P - 1)(F + B).",
    "3.2.1, table 2",
    "simulated orders, 2 micro-batches a rank, B = 2F, W = F, nothing gained by overlapping; traced: two"
    " processes of this machine, 8 micro-batches, beside a simulation from their own jobs' times",
    "Formula and simulation are exact where the formula holds (W <= F = I). Two processes on two cores"
    " have no network to hide: the trace shows that the order runs as simulated, not that overlap pays.",
    measure, draw,
)  # fmt: skip
