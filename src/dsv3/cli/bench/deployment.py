"""``dsv3 bench deployment``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def deployment(
    tokens: int = typer.Option(1024, "--tokens", min=1, help="of the prompt that is handed over"),
    model: Path = typer.Option(None, "--model", help="folder of a model whose experts are to be re-placed"),
    slots: int = typer.Option(0, "--slots", min=0, help="places for experts; 0: a quarter more than experts"),
    shards: int = typer.Option(8, "--shards", min=1, help="that the slots are divided among"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Handing an answer from prefill to decode beside a copy in memory; with --model, redundant experts."""
    from dsv3.bench.deployment import bench, report

    result = bench(tokens, model, slots, shards)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
