"""``dsv3 extend``: a longer context."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.recipe_help import OVERRIDES, command

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer()


def _recipe() -> type[Recipe]:
    from dsv3.config.extend import ExtendRecipe

    return ExtendRecipe


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def extend(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe, e.g. recipes/extend-tiny.yaml"),
    resume: str = typer.Option(
        None, "--resume", help="auto: skip finished phases, go on with the one that was interrupted"
    ),
) -> None:
    """Extend a model's context by YaRN in phases. Ctrl-C or SIGTERM saves a checkpoint and stops."""
    from dsv3.common.errors import UserError
    from dsv3.config.extend import ExtendRecipe
    from dsv3.config.recipe import load

    if resume not in (None, "auto"):
        raise UserError(f"--resume ({resume}) must be auto: the phases find their own checkpoints")
    read = load(ExtendRecipe, recipe, ctx.args)
    from dsv3.train.extend import extend as run  # torch: only for a recipe that is whole

    last = run(read, resume is not None)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        return
    if last is None:
        typer.echo("stopped; the checkpoint is saved. Go on with the same command and --resume auto")
        return
    lengths = ",".join(str(phase.sequence_length) for phase in read.phases)
    typer.echo(f"models: {', '.join(f'{phase.out}/model' for phase in read.phases)}")
    typer.echo(f"next: dsv3 niah {last}/model --haystack {read.phases[-1].data.path} --lengths {lengths}")
