"""What verbs that take a recipe share: help with every key's meaning, unit and default, and last words."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_origin

import typer
import typer.core

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe
    from dsv3.config.train import TrainRecipe

# For `@app.command(context_settings=OVERRIDES)`: what is not an option of the verb is an override of a key.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
WIDTH = 100


def describe(cls: type[Recipe]) -> str:
    """One paragraph a key: ``--section.key TYPE  meaning [default: value]``."""
    import yaml

    from dsv3.config.recipe import keys

    lists = [name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list]
    lines = []
    for key, (kind, meaning, default) in keys(cls).items():
        head, dot, rest = key.partition(".")
        if dot and head in lists:
            key = f"{head}[].{rest}"  # an entry of a list of sections
        if default is ...:
            value = "required"
        else:
            plain = default if isinstance(default, str | int | float | bool | list | None) else str(default)
            shown = yaml.safe_dump(plain, default_flow_style=True, width=1000, allow_unicode=True)
            value = "default: " + shown.removesuffix("...\n").strip()
        lines.append(f"  {key}  ({kind})")
        lines += textwrap.wrap(
            f"{meaning} [{value}]", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def command(recipe_class: Callable[[], type[Recipe]]) -> type[typer.core.TyperCommand]:
    """A command class whose ``--help`` ends with every key of a recipe.

    ``recipe_class`` is called only when help is shown, so that the import waits until then. Use as
    ``@app.command(cls=command(lambda: ...), context_settings=OVERRIDES)``.
    """

    class WithKeys(typer.core.TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            formatter.write(
                "\nRecipe keys (in the file, or as --key VALUE; entries of a list [] in the file only):\n\n"
            )
            formatter.write(describe(recipe_class()) + "\n")

    return WithKeys


def say_end(recipe: TrainRecipe, finished: bool, next_command: str) -> None:
    """The last words of a training verb: where things lie and what to do next, or how to go on."""
    out = recipe.out
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes the first speaks
    if finished:
        typer.echo(f"plots: {out}/plots   metrics: {out}/metrics.jsonl   model: {out}/model")
        typer.echo(f"next: {next_command}")
    else:
        again = f"dsv3 {recipe.stage} {out}/recipe.yaml --resume auto"
        typer.echo(f"stopped; the checkpoint is saved. Go on with: {again}")
