"""``dsv3 eval``: how well a model knows a text, and what a number format costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dsv3.evaluate.held_out import HeldOut

app = typer.Typer()


@app.command("eval")
def evaluate(
    folder: Path = typer.Argument(help="Hugging Face folder of a model, with its tokenizer"),
    data: Path = typer.Option(
        ..., "--data", help="a text file, or a folder of dsv3 data prepare: its held-out part is read"
    ),
    quantize: list[str] = typer.Option(
        [], "--quantize", help="also with the weights in fp8, int8 or int4; may be given again"
    ),
    length: int = typer.Option(256, "--length", min=1, help="tokens read at once"),
    sequences: int = typer.Option(128, "--sequences", min=1, help="so many of that length, of each source"),
    as_json: bool = typer.Option(False, "--json", help="print the result as JSON"),
) -> None:
    """Bits per byte of held-out text (less is better) and the share of MTP drafts the model agrees with."""
    from dsv3.evaluate.quality import compare

    found = compare(folder, data, quantize, length, sequences)
    if as_json:
        plain = {name: {text: asdict(one) for text, one in row.items()} for name, row in found.items()}
        typer.echo(json.dumps(plain, indent=2))
    else:
        typer.echo(_table(found))


def _table(found: dict[str, dict[str, HeldOut]]) -> str:
    """A line a number format: bits per byte, how much more than as stored, MTP acceptance."""
    before = next(iter(found.values()))
    lines = ["bits per byte".ljust(16) + "".join(text.ljust(32) for text in before)]
    for name, row in found.items():
        cells = []
        for text, one in row.items():
            cell = f"{one.bits_per_byte:.4f}"
            if row is not before:
                cell += f" {one.bits_per_byte / before[text].bits_per_byte - 1:+.2%}"
            if one.acceptance:
                cell += f"  MTP {', '.join(f'{share:.1%}' for share in one.acceptance)}"
            cells.append(cell.ljust(32))
        lines.append(name.ljust(16) + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)
