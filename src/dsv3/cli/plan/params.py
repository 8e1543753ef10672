"""``dsv3 plan params``."""

from __future__ import annotations

import json
from typing import Any

import typer

from dsv3.cli.plan.group import app, human
from dsv3.cli.tables import show


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
    from dsv3.plan.params import billions

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
    title = f"{model}: {billions(main)} parameters, {billions(found['parameters_activated'])} activated"
    notes = [
        ("activated, embedding counted", billions(found["parameters_activated_with_embedding"])),
        ("in the files (MTP repeats embedding and head)", billions(found["parameters_files"])),
        ("cache, BF16", f"{found['kv_bytes_per_token']:,} bytes a token"),
        (
            f"training, sequences of {found['seq_len_tokens']:,}",
            f"{human(found['train_flops_per_token'])} FLOPs a token"
            f" ({human(found['train_flops_per_token_without_mtp'])} without MTP)",
        ),
    ]
    show(title, header, rows, ends=[len(by_part) - 1])
    for name, value in notes:
        print(f"{name}: {value}")
