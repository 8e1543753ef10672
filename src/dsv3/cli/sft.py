"""``dsv3 sft``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.recipe_help import OVERRIDES, command, say_end

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe
    from dsv3.config.sft import SFTRecipe

app = typer.Typer()


def _recipe() -> type[Recipe]:
    from dsv3.config.sft import SFTRecipe

    return SFTRecipe


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def sft(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe, e.g. recipes/sft-tiny.yaml"),
    resume: str = typer.Option(
        None, "--resume", help="auto: go on from the newest whole checkpoint of out; or a checkpoint's folder"
    ),
    show: int = typer.Option(
        0, "--show", min=0, help="print so many examples as the model sees them and train nothing"
    ),
) -> None:
    """Fine-tune a model on examples. Ctrl-C or SIGTERM saves a checkpoint and stops."""
    from dsv3.config.recipe import load
    from dsv3.config.sft import SFTRecipe

    read = load(SFTRecipe, recipe, ctx.args)
    if show:
        _show(read, show)
        return
    from dsv3.train.sft import sft as run

    say_end(read, run(read, resume) is not None, f"dsv3 chat {read.out}/model")


def _show(recipe: SFTRecipe, count: int) -> None:
    """The first examples as text: green what bears loss, or between [[ and ]] where there is no colour."""
    from itertools import islice

    from rich.console import Console
    from rich.text import Text

    from dsv3.data import rows
    from dsv3.data.examples import spans, tokens
    from dsv3.train.sft import open_tokenizer

    tokenizer, length = open_tokenizer(recipe), recipe.sequence_length
    console = Console(soft_wrap=True, highlight=False)
    coloured = console.color_system is not None and not console.no_color
    for row in islice(rows.read(recipe.data.train), count):
        ids, bears = tokens(tokenizer, row, recipe.data.keep_think)
        counts = f"{len(ids)} tokens, {bears.sum()} bear loss"
        if len(ids) > length:
            counts += f"; longer than sequence_length ({length}): data.long is {recipe.data.long}"
        console.print(Text(f"== {row.where}: {counts}", style="bold"))
        shown = Text()
        for text, bearing in spans(tokenizer, ids, bears):
            if coloured:
                shown.append(text, style="green" if bearing else "dim")
            else:
                shown.append(f"[[{text}]]" if bearing else text)
        console.print(shown, end="\n\n")
    console.print(Text("green bears loss" if coloured else "what stands between [[ and ]] bears loss"))
