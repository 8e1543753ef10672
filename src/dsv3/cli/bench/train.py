"""``dsv3 bench train``."""

from __future__ import annotations

import json

import typer

from dsv3.cli.bench.group import app


@app.command()
def train(
    vs: str = typer.Option("transformers", "--vs", help="the peer: transformers"),
    case: str = typer.Option("cpu-63m", "--case", help="cpu-63m (FP32) or gpu-1b (BF16 on CUDA)"),
    steps: int = typer.Option(9, "--steps", min=1, help="counted steps of each"),
    threads: int = typer.Option(0, "--threads", min=0, help="CPU threads of each; 0: torch's choice"),
    compiled: bool = typer.Option(False, "--compile", help="torch.compile our layers (the peer is eager)"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Training steps a second and peak memory: same shape, batch, optimizer and threads, MTP off."""
    from dsv3.bench.train import CASES, bench, report
    from dsv3.common.errors import UserError, nearest

    if vs != "transformers":
        raise UserError(f"--vs ({vs}) is not a peer of this benchmark; use transformers")
    if case not in CASES:
        raise UserError(f"--case ({case}) is unknown{nearest(case, CASES)}; there are {', '.join(CASES)}")
    if CASES[case]["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"--case ({case}) needs a CUDA device, and there is none; use --case cpu-63m")
    peers = [f"{vs}:grouped_mm", f"{vs}:eager"]
    result = bench(case, peers, steps=steps, threads=threads, compiled=compiled)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
