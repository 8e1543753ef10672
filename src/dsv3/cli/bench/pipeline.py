"""``dsv3 bench pipeline``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def pipeline(
    schedule: str = typer.Option(
        "1f1b,dualpipev", "--schedule", help="one or more of 1f1b, interleaved, zbv, dualpipev, with commas"
    ),
    ranks: int = typer.Option(2, "--ranks", min=2, help="processes of this machine, a thread each"),
    micro_batches: int = typer.Option(8, "--micro-batches", min=1, help="micro-batches a step"),
    steps: int = typer.Option(5, "--steps", min=1, help="counted steps; the fastest is shown"),
    out: Path = typer.Option(
        Path("runs/bench-pipeline"), "--out", help="folder of the traces and the picture"
    ),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Trace real pipeline steps (for Perfetto) and draw them above their simulation."""
    from dsv3.bench.pipeline import bench, report
    from dsv3.parallel.pipeline.cut import stages_of

    names = [name.strip() for name in schedule.split(",")]
    for name in names:
        stages_of(name, 0, ranks)
    result = bench(names, ranks, micro_batches, steps, out)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
