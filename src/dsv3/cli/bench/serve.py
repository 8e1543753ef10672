"""``dsv3 bench serve``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def serve(
    folder: Path = typer.Argument(None, help="model to serve, with --draft-tokens and without in turns"),
    url: str = typer.Option(None, "--url", help="or: a server that runs, like http://127.0.0.1:8000"),
    remote: bool = typer.Option(False, "--remote", help="allow a --url elsewhere: a server of yours"),
    rate: float = typer.Option(2.0, "--rate", help="requests a second on average, as a Poisson process"),
    seconds: float = typer.Option(30.0, "--seconds", help="how long requests arrive, in each run"),
    requests: int = typer.Option(
        0, "--requests", min=0, help="or: how many; 0: those that come in --seconds"
    ),
    prompt_length: int = typer.Option(600, "--prompt-length", min=1, help="characters of a prompt"),
    prefix_share: float = typer.Option(
        0.5, "--prefix-share", help="part of a prompt that is the same in all, from 0 to 1"
    ),
    max_tokens: int = typer.Option(64, "--max-tokens", min=1, help="tokens of an answer"),
    text: Path = typer.Option(None, "--text", help="file to cut prompts from; default: Python's own source"),
    draft_tokens: int = typer.Option(1, "--draft-tokens", min=0, max=8, help="drafts a step; 0: no turns"),
    rounds: int = typer.Option(2, "--rounds", min=1, help="of each, in turns"),
    seed: int = typer.Option(0, "--seed", min=0, help="of arrivals and prompts"),
    plot: Path = typer.Option(None, "--plot", help="PNG file for the distributions of the latencies"),
    soak: float = typer.Option(
        None, "--soak", help="instead: minutes of good, bad, aborted and oversized requests, then a check-up"
    ),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Throughput and latencies of a server under load, MTP on beside off; DSV3_API_KEY is sent to a --url."""
    from dsv3.common.errors import Failure, UserError

    if (folder is None) == (url is None):
        raise UserError("give a model's folder, or --url of a server that runs: one of the two")
    if folder is not None and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give the local folder of a Hugging Face checkpoint")
    if plot is not None and not plot.parent.is_dir():
        raise UserError(f"--plot ({plot}): there is no folder {plot.parent}")
    if soak is not None:
        from dsv3.bench.soak import bench as soak_bench
        from dsv3.bench.soak import report as soak_report

        if folder is None or soak <= 0:
            raise UserError(f"--soak ({soak:g}) needs a model's folder, and minutes above 0")
        result = soak_bench(folder, soak, seed)
        typer.echo(json.dumps(result, indent=2) if as_json else soak_report(result))
        if result["failed"]:
            raise Failure(f"the soak test failed: {', '.join(result['failed'])}")
        return
    import os

    from dsv3.bench.load import Target
    from dsv3.bench.serve import Load, bench, default_text, draw, report

    try:
        words = default_text() if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text ({text}) cannot be read: {error}") from None
    load = Load(rate, seconds, requests, prompt_length, prefix_share, max_tokens, seed, words)
    where = folder if url is None else Target.parse(url, os.environ.get("DSV3_API_KEY", ""), remote)
    result = bench(where, load, draft_tokens, rounds)
    if plot is not None:
        draw(result, plot)
    del result["latencies"]
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
