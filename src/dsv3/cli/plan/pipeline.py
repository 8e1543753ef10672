"""``dsv3 plan pipeline``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from dsv3.cli.plan.group import JSON, app
from dsv3.cli.tables import show


@app.command()
def pipeline(
    schedule: str = typer.Option(
        "1f1b,zb1p,dualpipe",
        "--schedule",
        help="One or more of 1f1b, interleaved, zb1p, zbv, dualpipe, dualpipev, with commas.",
    ),
    ranks: int = typer.Option(8, "--ranks", help="Pipeline ranks P."),
    micro_batches: int = typer.Option(20, "--micro-batches", help="Micro-batches a step M."),
    forward: float = typer.Option(
        1.0, "--forward", help="Forward F of one micro-batch on one rank, in --unit."
    ),
    backward: float = typer.Option(2.0, "--backward", help="Whole backward B, in --unit."),
    weight: float = typer.Option(1.0, "--weight", help="The part of B for the weights W, in --unit."),
    overlapped: float = typer.Option(
        None, "--overlapped", help="F&B, a forward and a backward overlapped. [default: F + B]"
    ),
    communication: float = typer.Option(0.0, "--communication", help="Delay from rank to rank, in --unit."),
    stages_per_rank: int = typer.Option(2, "--stages-per-rank", help="Stages a rank v, for interleaved."),
    unit: str = typer.Option("forwards", "--unit", help="What the times are in, e.g. ms."),
    out: Path = typer.Option(None, "--out", help="Draw the schedules into this PNG."),
    as_json: bool = JSON,
) -> None:
    """Play pipeline schedules: bubble beside its formula, time, activations held; drawn with --out."""
    from dsv3.common.errors import UserError
    from dsv3.plan import pipeline as play
    from dsv3.plan.schedules import schedule as made

    times = play.Times(forward, backward, weight, overlapped, communication)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out ({out}): the folder {out.parent} does not exist")
    if out is not None and out.suffix != ".png":
        raise UserError(f"--out ({out}) must end in .png")
    names = [name.strip() for name in schedule.split(",")]
    orders = [made(name, ranks, micro_batches, stages_per_rank) for name in names]
    ran = [play.simulate(order, times) for order in orders]
    found = [play.summary(timeline) for timeline in ran]
    if out is not None:
        from dsv3.plan.draw import draw

        draw(ran, out, unit)
    if as_json:
        print(json.dumps({"unit": unit, "schedules": found, "picture": str(out) if out else None}, indent=2))
        return
    rows = [_pipeline_row(row) for row in found]
    header = ("schedule", "time", "bubble", "share", "formula", "gives", "held at most")
    show(f"{ranks} ranks, {micro_batches} micro-batches; times in {unit}", header, rows)
    print(
        "held: micro-batches through 1/P of the model; formulas: without communication, for B - W = F, W <= F"
    )
    if out is not None:
        print(f"picture: {out}")


def _pipeline_row(row: dict[str, Any]) -> tuple[str, ...]:
    known = row["bubble_formula"]
    return (
        row["schedule"], f"{row['time_total']:.4g}", f"{row['time_bubble']:.4g}",
        f"{100 * row['bubble_share']:.1f}%", known or "-",
        f"{row['time_bubble_formula']:.4g}" if known else "-",
        f"{max(row['peak_activations_by_rank_micro_batches']):g}",
    )  # fmt: skip
