"""``dsv3 init``: a model with random weights, of any size and number format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.recipe_help import OVERRIDES, command

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer()


def _config() -> type[Recipe]:
    from dsv3.config.model import ModelConfig

    return ModelConfig


@app.command(cls=command(_config), context_settings=OVERRIDES)
def init(
    ctx: typer.Context,
    model: str = typer.Argument(help="a preset (tiny, small, 16b, v3-671b), or a folder with a config.json"),
    target: Path = typer.Argument(help="folder to be made"),
    to: str = typer.Option("bf16", "--to", help="bf16, fp32, fp8, int8 or int4"),
    group: int = typer.Option(None, "--group", help="inputs of an INT4 group: 32, 64 or 128 (the default)"),
    seed: int = typer.Option(0, "--seed", min=0, help="of the weights"),
    tokenizer: Path = typer.Option(None, "--tokenizer", help="folder whose tokenizer goes along"),
    workers: int = typer.Option(2, "--workers", min=1, help="threads"),
    as_json: bool = typer.Option(False, "--json", help="print the result as JSON"),
) -> None:
    """Write a model with random weights, never whole in memory; --KEY VALUE changes the preset."""
    from dsv3.checkpoint.init import init as run
    from dsv3.common.errors import UserError
    from dsv3.config.model import ModelConfig
    from dsv3.config.recipe import merge, parse_overrides, validate
    from dsv3.plan.params import resolve

    tree = resolve(model).model_dump()
    for key, value in parse_overrides(ctx.args).items():
        merge(tree, key, value)
    config = validate(ModelConfig, tree)
    if tokenizer is not None:
        from dsv3.data.tokenizer import Tokenizer

        tokens = Tokenizer.load(tokenizer).vocab_size
        if tokens > config.vocab_size:
            raise UserError(f"vocab_size ({config.vocab_size}) is less than the {tokens} of {tokenizer}")
    made = run(config, target, to, seed, tokenizer, group, workers)
    if as_json:
        found = {
            "folder": str(made.folder), "parameters": made.parameters,
            "written_bytes": made.written_bytes, "seconds": made.seconds,
        }  # fmt: skip
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(
        f"{made.folder}: {made.parameters / 1e9:.2f}B parameters in {to}; wrote"
        f" {made.written_bytes / 1e9:.2f} GB in {made.seconds:.0f} s"
    )
    if tokenizer is not None:
        typer.echo(f"next: dsv3 chat {made.folder}")
