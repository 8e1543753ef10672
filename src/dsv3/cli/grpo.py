"""``dsv3 grpo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.recipe_help import OVERRIDES, command, say_end

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer()


def _recipe() -> type[Recipe]:
    from dsv3.config.grpo import GRPORecipe

    return GRPORecipe


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def grpo(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe, e.g. recipes/grpo-tiny.yaml"),
    resume: str = typer.Option(
        None, "--resume", help="auto: go on from the newest whole checkpoint of out; or a checkpoint's folder"
    ),
) -> None:
    """Reinforce a model on verifiable tasks or your own rewards. Ctrl-C or SIGTERM saves and stops."""
    from dsv3.config.grpo import GRPORecipe
    from dsv3.config.recipe import load

    read = load(GRPORecipe, recipe, ctx.args)
    from dsv3.train.grpo.run import grpo as run  # torch: only for a recipe that is whole

    say_end(read, run(read, resume) is not None, f"dsv3 chat {read.out}/model")
