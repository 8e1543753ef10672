"""``dsv3 tokenizer``: train a byte-level BPE on a data recipe's documents."""

from __future__ import annotations

import typer

app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)
