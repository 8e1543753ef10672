"""``dsv3 bench length``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def length(
    lengths: str = typer.Option("1K,2K,4K,8K", "--lengths", help="tokens of the one sequence, K for 1024"),
    threads: int = typer.Option(0, "--threads", min=0, help="CPU threads; 0: torch's choice"),
    plot: Path = typer.Option(None, "--plot", help="PNG file for memory against length"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Peak memory of a step of tiny against the length of its sequence, and the exponent of its growth."""
    from dsv3.bench import length as measured
    from dsv3.cli.niah import tokens

    result = measured.bench(tokens(lengths), threads=threads)
    if plot is not None:
        measured.draw(result, plot)
    typer.echo(json.dumps(result, indent=2) if as_json else measured.report(result))
