"""``dsv3 bench convert``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def convert(
    path: str = typer.Option(tempfile.gettempdir(), "--path", help="folder on the disk to be measured"),
    gigabytes: float = typer.Option(
        1.0, "--gigabytes", help="size of the BF16 folder; 4 times that is needed"
    ),
    rounds: int = typer.Option(5, "--rounds", min=1, help="of each, in turns"),
    workers: int = typer.Option(2, "--workers", min=1, help="threads of each"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """dsv3 convert, BF16 to FP8 and back, beside copying the same files: bytes read and written a second."""
    from dsv3.bench.convert import bench, report
    from dsv3.common.errors import UserError

    if not Path(path).is_dir():
        raise UserError(f"--path ({path}) is not a folder; name one on the disk to be measured")
    result = bench(Path(path), gigabytes, rounds, workers)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
