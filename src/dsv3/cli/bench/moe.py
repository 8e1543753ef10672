"""``dsv3 bench moe``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def moe(
    ranks: str = typer.Option("1,2,4", "--ranks", help="numbers of processes, with commas; a thread each"),
    sequences: int = typer.Option(8, "--sequences", min=1, help="of each process, a step"),
    length: int = typer.Option(128, "--length", min=2, help="tokens of a sequence"),
    steps: int = typer.Option(3, "--steps", min=1, help="counted steps of each case; the fastest is shown"),
    out: Path = typer.Option(Path("runs/bench-moe"), "--out", help="folder of the picture"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Dispatch and combine against bytes / bandwidth, weak scaling and layouts' steps, on this machine."""
    from dsv3.bench.moe import bench, report
    from dsv3.common.errors import UserError

    counts = [int(word) if word.strip().isdigit() else 0 for word in ranks.split(",")]
    if not all(count in (1, 2, 4, 8) for count in counts):  # divisors of the model's experts
        raise UserError(f"--ranks ({ranks}) must be some of 1, 2, 4 and 8, with commas between")
    if sequences % max(counts) or sequences < 8 * (max(counts) > 1):
        raise UserError(f"--sequences ({sequences}) must be a multiple of 8: layouts divide one batch")
    result = bench(sorted(set(counts)), sequences, length, steps, out)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
