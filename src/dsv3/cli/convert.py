"""``dsv3 convert``: a checkpoint in another number format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dsv3.checkpoint.convert import Result

app = typer.Typer()


@app.command()
def convert(
    source: Path = typer.Argument(help="Hugging Face folder of a model: FP8, BF16 or FP32"),
    target: Path = typer.Argument(help="folder to be made"),
    to: str = typer.Option(
        ..., "--to", help="fp8 (the released layout), bf16, fp32, int8 or int4 (for CPUs)"
    ),
    scale_format: str = typer.Option(
        "float", "--scale-format", help="scales of fp8: float, or ue8m0 (powers of two, as in V3.1)"
    ),
    group: int = typer.Option(None, "--group", help="inputs of an INT4 group: 32, 64 or 128 (the default)"),
    workers: int = typer.Option(2, "--workers", min=1, help="threads; each takes 4 to 72 MiB of memory"),
    as_json: bool = typer.Option(False, "--json", help="print the result as JSON"),
) -> None:
    """Write a model's folder in another number format; run again after an interruption to go on."""
    from dsv3.checkpoint.convert import convert as run

    result = run(source, target, to, scale_format, workers, group)
    if as_json:
        moved = result.read_bytes + result.written_bytes
        found = {
            "folder": str(result.folder),
            "files": result.files,
            "read_bytes": result.read_bytes,
            "written_bytes": result.written_bytes,
            "seconds": result.seconds,
            "gb_per_second": moved / 1e9 / result.seconds,
        }
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(_report(result, source, to))


def _report(result: Result, source: Path, to: str) -> str:
    from dsv3.checkpoint.hf import tokenizer_files

    rate = (result.read_bytes + result.written_bytes) / 1e9 / result.seconds
    lines = [
        f"{result.folder}: {result.files} files; read {result.read_bytes / 1e9:.2f} GB, wrote"
        f" {result.written_bytes / 1e9:.2f} GB in {result.seconds:.1f} s ({rate:.2f} GB/s)"
    ]
    if result.ue8m0_source and to != "fp8":
        lines.append(f"the scales of {source} are powers of two: to go back, add --scale-format ue8m0")
    if tokenizer_files(result.folder):
        lines.append(f"next: dsv3 generate {result.folder} --prompt 'def main('")
    else:
        quantize = ', quantize="fp8"' if to == "fp8" else ""
        lines.append(f'next: dsv3.load("{result.folder}"{quantize}) in Python; the folder has no tokenizer')
    return "\n".join(lines)
