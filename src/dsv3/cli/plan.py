"""``dsv3 plan``: what a model or a run will take."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

app = typer.Typer(help="Count before you start: parameters, cache, FLOPs.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Count before you start: parameters, cache, FLOPs."""


@app.command()
def params(
    model: str = typer.Argument(help="A preset (tiny, small, 16b, v3-671b) or a checkpoint folder."),
    seq_len: int = typer.Option(4096, min=1, help="Tokens in a training sequence, for attention's FLOPs."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON; the keys name their units."),
) -> None:
    """Parameters (total, activated, MTP, in the files), cache bytes and training FLOPs a token."""
    from dsv3.plan.params import resolve, summary

    found = summary(resolve(model), seq_len)
    if as_json:
        print(json.dumps({"model": model, **found}, indent=2))
    else:
        _print(model, found)


def _print(model: str, found: dict[str, Any]) -> None:
    from dsv3.common.progress import human

    by_part, active = found["parameters_by_part"], found["parameters_activated_by_part"]
    main = found["parameters_main"]
    rows = [
        (part, f"{size:,}", f"{active[part]:,}", f"{100 * size / main:.2f}%")
        for part, size in by_part.items()
    ]
    rows.append(("main model", f"{main:,}", f"{found['parameters_activated']:,}", "100.00%"))
    if found["parameters_mtp"]:
        rows.append(("MTP", f"{found['parameters_mtp']:,}", f"{found['parameters_mtp_activated']:,}", ""))
    header = ("part", "parameters", "activated a token", "of main")
    title = f"{model}: {_billions(main)} parameters, {_billions(found['parameters_activated'])} activated"
    notes = [
        ("activated, embedding counted", _billions(found["parameters_activated_with_embedding"])),
        ("in the files (MTP repeats embedding and head)", _billions(found["parameters_files"])),
        ("cache, BF16", f"{found['kv_bytes_per_token']:,} bytes a token"),
        (
            f"training, sequences of {found['seq_len_tokens']:,}",
            f"{human(found['train_flops_per_token'])} FLOPs a token"
            f" ({human(found['train_flops_per_token_without_mtp'])} without MTP)",
        ),
    ]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header[:1], title=title)
        for column in header[1:]:
            table.add_column(column, justify="right")
        for index, row in enumerate(rows):
            table.add_row(*row, end_section=index == len(by_part) - 1)
        Console().print(table)
    else:
        print(title)
        lines = [header, *rows]
        widths = [max(len(row[i]) for row in lines) for i in range(len(header))]
        for first, *rest in lines:
            cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:]))]
            print("  ".join(cells).rstrip())
    for name, value in notes:
        print(f"{name}: {value}")


def _billions(count: int) -> str:
    """``671.0B``, ``15.2M``."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
