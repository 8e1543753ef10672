"""``dsv3 generate``: continue a prompt, or fill in the middle."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def generate(
    folder: Path = typer.Argument(help="Hugging Face folder of a model, with its tokenizer"),
    prompt: str = typer.Option(..., "--prompt", help="text to continue; with --suffix, what comes before"),
    suffix: str = typer.Option(None, "--suffix", help="fill in the middle: the text that comes after"),
    max_tokens: int = typer.Option(64, "--max-tokens", min=1, max=4096, help="tokens to generate"),
    temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0: the likeliest token each time"),
    seed: int = typer.Option(0, "--seed", min=0, help="of the sampling"),
) -> None:
    """Print what a model writes after a prompt (or between --prompt and --suffix)."""
    from dsv3.checkpoint.hf import load
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.evaluate.sample import complete

    model, tokenizer = load(folder), Tokenizer.load(folder)
    typer.echo(complete(model, tokenizer, prompt, suffix, max_tokens, temperature, seed))
