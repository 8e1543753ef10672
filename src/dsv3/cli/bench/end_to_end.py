"""``dsv3 bench end-to-end``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.bench.group import app
from dsv3.cli.recipe_help import OVERRIDES, command

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe


def _recipe() -> type[Recipe]:
    from dsv3.config.end_to_end import EndToEndRecipe

    return EndToEndRecipe


@app.command("end-to-end", cls=command(_recipe), context_settings=OVERRIDES)
def end_to_end(
    ctx: typer.Context,
    recipe: Path = typer.Argument(Path("recipes/pipeline-tiny.yaml"), help="YAML recipe"),
    docs: Path = typer.Option(
        None, "--docs", help="folder for pipeline.md and its images; default: the recipe's out"
    ),
    as_json: bool = typer.Option(False, "--json", help="print the figures as JSON"),
) -> None:
    """Tokenizer to served model, every stage over several seeds, and a page; run again, it goes on."""
    from dsv3.bench.end_to_end.figures import gather
    from dsv3.bench.end_to_end.page import write
    from dsv3.bench.end_to_end.stages import end_to_end as run
    from dsv3.config.end_to_end import EndToEndRecipe
    from dsv3.config.recipe import load

    read = load(EndToEndRecipe, recipe, ctx.args)
    if not run(read):
        typer.echo("stopped; what is done is kept. Go on with the same command")
        return
    found = gather(read)
    page = write(read, found, docs or Path(read.out))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"the page: {page}")
    typer.echo(f"next: dsv3 chat {read.out}/seed-{read.seeds[0]}/grpo/model")
