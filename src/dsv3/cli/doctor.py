"""``dsv3 doctor``: what this machine has, and which fast paths are on."""

from __future__ import annotations

import json

import typer

app = typer.Typer()


@app.command()
def doctor(as_json: bool = typer.Option(False, "--json", help="print JSON, sizes in bytes")) -> None:
    """What this machine has, which fast paths are on, and why others are off."""
    from dsv3.bench.doctor import examine, report
    from dsv3.common.progress import human

    found = examine()
    typer.echo(json.dumps(found, indent=2) if as_json else report(found, human))
