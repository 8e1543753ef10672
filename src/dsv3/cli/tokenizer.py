"""``dsv3 tokenizer``: train a byte-level BPE on a data recipe's documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.group import Verbs
from dsv3.cli.recipe_help import OVERRIDES, command

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer(cls=Verbs, help="Train a tokenizer.", no_args_is_help=True)


def _recipe() -> type[Recipe]:
    from dsv3.config.data import DataRecipe

    return DataRecipe


@app.callback()
def _group() -> None:
    """Train a tokenizer."""


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def train(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML data recipe, e.g. recipes/data-tiny.yaml"),
    to: Path = typer.Option(..., "--to", help="folder for tokenizer.json and tokenizer_config.json"),
) -> None:
    """Train byte-level BPE the way DeepSeek's was, on the recipe's training documents."""
    from dsv3.common.errors import UserError
    from dsv3.config.data import DataRecipe
    from dsv3.config.recipe import load
    from dsv3.data.prepare import train_tokenizer
    from dsv3.data.writable import writable

    loaded = load(DataRecipe, recipe, ctx.args)
    if (to / "tokenizer.json").exists():
        raise UserError(f"--to ({to}) holds a tokenizer already: choose another folder")
    if loaded.tokenizer.path is not None:
        raise UserError(
            f"tokenizer.path ({loaded.tokenizer.path}) is set, so there is nothing to train: remove it"
        )
    writable(to, "--to")
    tokenizer = train_tokenizer(loaded)
    tokenizer.save(to)
    typer.echo(f"{to}/tokenizer.json: {tokenizer.vocab_size} tokens")
    typer.echo(f"next: dsv3 data prepare {recipe} --tokenizer.path {to}")
