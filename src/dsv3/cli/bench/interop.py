"""``dsv3 bench interop``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def interop(
    model: Path = typer.Argument(Path("runs/quickstart/model"), help="folder of a trained model"),
    data: Path = typer.Option(Path("data/tiny"), "--data", help="prepared data whose held-out text is asked"),
    llama_cpp: Path = typer.Option(
        None, "--llama-cpp", envvar="DSV3_LLAMA_CPP", help="folder of llama.cpp, built with llama-completion"
    ),
    only: list[str] = typer.Option(
        [], "--only", help="transformers, llama.cpp, lm-eval, trl or openai; may be repeated"
    ),
    out: Path = typer.Option(Path("runs/interop"), "--out", help="folder of the exported model and results"),
    page: Path = typer.Option(Path("docs/interop.md"), "--page", help="Markdown page to write"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """A trained model, exported, in the software of others: whatever is installed is asked, and a page made.

    Exit status 1 where one of them finds something else than we do.
    """
    from dsv3.bench.interop.run import bench, failed, report
    from dsv3.common.errors import Failure, UserError

    if not page.parent.is_dir():
        raise UserError(f"--page ({page}): there is no folder {page.parent}")
    results = bench(model, data, out, llama_cpp, tuple(only), page)
    typer.echo(json.dumps(results, indent=2) if as_json else report(results) + f"\npage: {page}")
    if names := failed(results):
        raise Failure(f"not as we do: {', '.join(names)}")
