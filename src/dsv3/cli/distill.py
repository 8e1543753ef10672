"""``dsv3 distill``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dsv3.cli.recipe_help import OVERRIDES, command

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer()


def _recipe() -> type[Recipe]:
    from dsv3.config.distill import DistillRecipe

    return DistillRecipe


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def distill(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe, e.g. recipes/distill-tiny.yaml"),
    resume: str = typer.Option(None, "--resume", help="auto: go on with the attempts in out"),
    as_json: bool = typer.Option(False, "--json", help="print the report as JSON"),
) -> None:
    """Let an expert answer prompts and keep what is right and concise, as data for dsv3 sft."""
    from dsv3.common.errors import UserError
    from dsv3.config.distill import DistillRecipe
    from dsv3.config.recipe import load

    if resume not in (None, "auto"):
        raise UserError(f"--resume ({resume}) must be auto")
    loaded = load(DistillRecipe, recipe, ctx.args)

    from dsv3.train.distill import distill as run

    try:
        report = run(loaded, resume=resume == "auto")
    except KeyboardInterrupt:
        typer.echo(
            f"stopped; nothing is lost. Go on with: dsv3 distill {loaded.out}/recipe.yaml --resume auto"
        )
        raise
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _show(report, loaded.out)


def _show(report: dict[str, Any], out: str) -> None:
    from dsv3.cli.tables import show

    rows = []
    for name, found in [*report["tasks"].items(), ("all", report)]:
        dropped = ", ".join(f"{count} {reason}" for reason, count in found["dropped"].items())
        row = [found["prompts"], found["answered"], found["attempts"], found["right"], found["kept"]]
        rows.append([name, *map(str, row), dropped or "none"])
    header = ["task", "prompts", "answered", "attempts", "right", "kept", "dropped"]
    show("Rejection sampling", header, rows, ends=(len(rows) - 2,))
    lengths = {kind: found for kind, found in report["characters"].items() if found}
    typer.echo(
        "characters (median): " + ", ".join(f"{kind} {found['median']:g}" for kind, found in lengths.items())
    )
    typer.echo(f"every attempt: {out}/attempts.jsonl   plots: {out}/plots")
    typer.echo(f"samples: {out}/samples.jsonl ({report['samples']})")
    typer.echo(f"pairs: {out}/pairs.jsonl ({report['pairs']})")
    typer.echo(f"judgements: {out}/judgements.jsonl ({report['judgements']})")
    if report["kept"]:
        typer.echo(f"next: dsv3 sft recipes/sft-tiny.yaml --data.train '[{out}/samples.jsonl]'")
    else:
        typer.echo("nothing was kept: look at the attempts, and try easier prompts or another expert")
