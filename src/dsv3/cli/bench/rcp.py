"""``dsv3 bench rcp``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def rcp(
    context: typer.Context,
    seeds: int = typer.Option(5, "--seeds", help="runs: seeds 0, 1, 2 ...; 3 at least, 6 for --reference"),
    workers: int = typer.Option(
        0, "--workers", min=0, help="runs at once; 0: one a core. OMP_NUM_THREADS: threads of each"
    ),
    out: Path = typer.Option(
        None,
        "--out",
        help="folder of the runs; default: runs/rcp-tiny/ and the commit, so that new code is trained anew",
    ),
    note: str = typer.Option(None, "--note", help="what is new: adds a row to docs/leaderboard.md"),
    reference: bool = typer.Option(
        False, "--reference", help="make these runs the reference points; rows beside the old ones go"
    ),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Steps to a target log-perplexity, checked against reference points by MLPerf's rule.

    Trains recipes/rcp-tiny.yaml (minutes of one core a seed); goes on where it was stopped. Keys of the
    recipe may follow as --any.key value: a change to be judged. Exit status 1 where it does not pass.
    """
    from dsv3.bench import rcp as bench
    from dsv3.bench.rcp_points import Points
    from dsv3.common.errors import Failure, UserError

    if reference and context.args:
        raise UserError(f"--reference takes the recipe as it is, not with {context.args[0]}")
    least = bench.LEAST_REFERENCE if reference else bench.LEAST
    row = bench.bench(seeds, out, workers or os.cpu_count() or 1, context.args, least)
    if reference:
        row = bench.as_reference(row, note or "reference points")
        points = Points(bench.POINTS, bench.content(bench.RECIPE), row)
        points.save()
    elif note is not None:
        points = Points.load(bench.POINTS, bench.RECIPE)
        points.add({**row, "note": note})
        points.save()
    typer.echo(json.dumps(row, indent=2) if as_json else bench.report(row))
    if (reference or note is not None) and not as_json:
        typer.echo(f"written: {bench.POINTS}, {bench.PAGE}")
    verdict = row.get("check", {}).get("verdict", "passes")
    if verdict == "faster":
        raise Failure(
            "it converges faster than the reference points allow: if that is meant, make these runs the new"
            " ones with --reference"
        )
    if verdict != "passes":
        raise Failure(f"the check does not pass: {verdict}")
