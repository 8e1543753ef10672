"""``dsv3 bench fp8``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def fp8(
    ablation: bool = typer.Option(
        False, "--ablation", help="train the tiny model in FP32, in FP8, and with each choice undone"
    ),
    memory: bool = typer.Option(False, "--memory", help="activation bytes a token a layer, by precision"),
    out: str = typer.Option("runs/fp8-ablation", "--out", help="folder of the ablation's runs"),
    steps: int = typer.Option(1000, "--steps", min=20, help="steps of each of the ablation's runs"),
    seed: list[int] = typer.Option(
        [0], "--seed", min=0, help="of the ablation's weights and order of data; may be repeated"
    ),
    data: str = typer.Option("data/tiny", "--data", help="prepared data of the ablation"),
    workers: int = typer.Option(2, "--workers", min=1, help="the ablation's runs at once"),
    only: list[str] = typer.Option([], "--only", help="a variation of the ablation; may be repeated"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """FP8 products and training beside BF16 on a GPU; or, on any machine, --ablation and --memory."""
    if ablation:
        from dsv3.bench import fp8_ablation

        result = fp8_ablation.ablation(Path(out), steps, seed, data, workers, only)
        text = fp8_ablation.report(result) + f"\nplot: {Path(out) / 'loss_gap.png'}"
    elif memory:
        from dsv3.bench import fp8_memory

        result = fp8_memory.bench()
        text = fp8_memory.report(result)
    else:
        from dsv3.bench import fp8_gemm

        result = fp8_gemm.bench()
        text = fp8_gemm.report(result)
    typer.echo(json.dumps(result, indent=2) if as_json else text)
