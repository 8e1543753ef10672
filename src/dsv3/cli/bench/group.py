"""The application ``dsv3 bench``, to which each module of this folder adds a verb."""

from __future__ import annotations

import typer

from dsv3.cli.group import Verbs

app = typer.Typer(cls=Verbs, help="Measure beside named peers in the same run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure beside named peers in the same run."""
