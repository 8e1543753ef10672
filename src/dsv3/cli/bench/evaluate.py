"""``dsv3 bench eval``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command("eval")
def evaluate(
    folder: Path = typer.Argument(help="Hugging Face folder of a model, with its tokenizer"),
    data: Path = typer.Option(..., "--data", help="a folder of benchmarks (docs/evaluation.md)"),
    tasks: str = typer.Option(
        "piqa,openbookqa,basic_arithmetic", "--tasks", help="ranked benchmarks, with commas between"
    ),
    samples: int = typer.Option(50, "--samples", min=1, help="questions of each"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Scores of dsv3 eval beside lm-eval's: over our engine, over dsv3 serve, with transformers."""
    from dsv3.bench.evaluate import agree, report
    from dsv3.common.errors import Failure
    from dsv3.evaluate.benchmarks.build import build

    result = agree(folder, [build(name.strip(), data, samples) for name in tasks.split(",")])
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
    if not result["agree"]:
        raise Failure("the four ways do not agree")
