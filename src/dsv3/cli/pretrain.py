"""``dsv3 pretrain`` and ``dsv3 quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.recipe_help import OVERRIDES, command, say_end

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer()


def _recipe() -> type[Recipe]:
    from dsv3.config.train import PretrainRecipe

    return PretrainRecipe


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def pretrain(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe, e.g. recipes/pretrain-tiny.yaml"),
    resume: str = typer.Option(
        None, "--resume", help="auto: go on from the newest whole checkpoint of out; or a checkpoint's folder"
    ),
) -> None:
    """Pre-train a model by a recipe. Ctrl-C or SIGTERM saves a checkpoint and stops."""
    from dsv3.config.recipe import load
    from dsv3.config.train import PretrainRecipe

    read = load(PretrainRecipe, recipe, ctx.args)
    from dsv3.train.pretrain import pretrain as run  # torch: only for a recipe that is whole

    say_end(read, run(read, resume) is not None, f"dsv3 generate {read.out}/model --prompt 'def main('")


@app.command()
def quickstart(
    out: Path = typer.Option(Path("runs/quickstart"), "--out", help="run folder"),
    total_tokens: float = typer.Option(
        None, "--total-tokens", "--total_tokens", min=1, help="tokens to train on; less is faster"
    ),
) -> None:
    """Train a tiny model on text Python already has, sample from it, draw the pictures."""
    from dsv3.train.quickstart import quickstart as run

    typer.echo(run(out, None if total_tokens is None else int(total_tokens)))
