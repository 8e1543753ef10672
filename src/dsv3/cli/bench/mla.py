"""``dsv3 bench mla``."""

from __future__ import annotations

import json

import typer

from dsv3.cli.bench.group import app


@app.command()
def mla(
    rounds: int = typer.Option(9, "--rounds", min=1, help="of each, in turns"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Attention over the paged cache on a GPU: GB/s of the kernels, beside copying memory."""
    from dsv3.bench import mla_decode

    result = mla_decode.bench(rounds)
    typer.echo(json.dumps(result, indent=2) if as_json else mla_decode.report(result))
