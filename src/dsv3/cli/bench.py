"""``dsv3 bench``: measured beside named peers in the same run."""

from __future__ import annotations

import json
import tempfile

import typer

app = typer.Typer(help="Measure beside named peers in the same run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure beside named peers in the same run."""


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


@app.command()
def fp8(
    ablation: bool = typer.Option(
        False, "--ablation", help="train the tiny model in FP32, in FP8, and with each choice undone"
    ),
    memory: bool = typer.Option(False, "--memory", help="activation bytes a token a layer, by precision"),
    out: str = typer.Option("runs/fp8-ablation", "--out", help="folder of the ablation's runs"),
    steps: int = typer.Option(1000, "--steps", min=20, help="steps of each of the ablation's runs"),
    seed: int = typer.Option(0, "--seed", min=0, help="of the ablation's weights and order of data"),
    data: str = typer.Option("data/tiny", "--data", help="prepared data of the ablation"),
    workers: int = typer.Option(2, "--workers", min=1, help="the ablation's runs at once"),
    only: list[str] = typer.Option([], "--only", help="a variation of the ablation; may be repeated"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """FP8 products and training beside BF16 on a GPU; or, on any machine, --ablation and --memory."""
    from pathlib import Path

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
    from pathlib import Path

    from dsv3.bench.convert import bench, report
    from dsv3.common.errors import UserError

    if not Path(path).is_dir():
        raise UserError(f"--path ({path}) is not a folder; name one on the disk to be measured")
    result = bench(Path(path), gigabytes, rounds, workers)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
