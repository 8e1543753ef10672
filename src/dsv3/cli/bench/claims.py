"""``dsv3 bench claims``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def claims(
    names: list[str] = typer.Argument(None, help="names or numbers; none: all that are not measured yet"),
    fast: bool = typer.Option(
        False, "--fast", help="small runs: each claim in under half an hour on 2 cores"
    ),
    seed: list[int] = typer.Option(
        [0, 1, 2], "--seed", min=0, help="of weights and order of data; may be repeated"
    ),
    workers: int = typer.Option(2, "--workers", min=1, help="training runs at once"),
    out: Path = typer.Option(Path("runs/claims"), "--out", help="folder of results, plots and training runs"),
    table: bool = typer.Option(False, "--table", help="only rebuild docs/claims.md from the results"),
    as_json: bool = typer.Option(False, "--json", help="print the results as JSON"),
) -> None:
    """The report's claims, measured: docs/claims.md. What was trained before is used again."""
    from dsv3.bench.claims import page, registry
    from dsv3.bench.claims.claim import Options
    from dsv3.common.errors import UserError

    if table:
        page.write(out)
        typer.echo(f"written: {page.PAGE}")
        return
    options = Options(fast, tuple(dict.fromkeys(seed)), workers, out)
    chosen = [registry.named(name) for name in names or ()]
    waiting = [claim for claim in registry.CLAIMS.values() if registry.result_of(claim, out) is None]
    results = {}
    for claim in chosen or waiting:
        try:
            result = registry.measure(claim, options)
        except UserError as error:
            if chosen or error.exit_code == 1:
                raise
            typer.echo(f"{claim.number} {claim.name} waits: {error}", err=True)
            continue
        results[claim.name] = result
        if not as_json:
            typer.echo(f"{claim.number} {claim.name}: {result['figure']}: {result['verdict']}")
    typer.echo(json.dumps(results, indent=2) if as_json else "next: dsv3 bench claims --table")
