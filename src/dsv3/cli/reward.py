"""``dsv3 reward``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.recipe_help import OVERRIDES, command, say_end

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer()


def _recipe() -> type[Recipe]:
    from dsv3.config.reward import RewardRecipe

    return RewardRecipe


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def reward(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe, e.g. recipes/reward-tiny.yaml"),
    resume: str = typer.Option(
        None, "--resume", help="auto: go on from the newest whole checkpoint of out; or a checkpoint's folder"
    ),
) -> None:
    """Train a reward model with a scalar head on pairs of a better and a worse answer."""
    from dsv3.config.recipe import load
    from dsv3.config.reward import RewardRecipe
    from dsv3.train.reward import reward as run

    read = load(RewardRecipe, recipe, ctx.args)
    finished = run(read, resume) is not None
    say_end(
        read, finished, f"{read.out}/model is a reward for dsv3 grpo (dsv3.evaluate.reward_model.RewardModel)"
    )
