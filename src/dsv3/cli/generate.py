"""``dsv3 generate``: continue a prompt, fill in the middle, or answer a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dsv3.serve.llm import LLM

app = typer.Typer()

DRAFTS = "tokens the MTP module proposes a step; not given: 1 if the model has one, else 0"


QUANTIZE = "keep the weights as fp8, int8 or int4; not given: as stored"


def open_llm(folder: Path, draft_tokens: int | None, quantize: str | None = None) -> LLM:
    """The model of a folder with its tokenizer, ready to generate."""
    from dsv3.checkpoint.hf import load
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.serve.llm import LLM

    tokenizer, model = Tokenizer.load(folder), load(folder, quantize=quantize)
    drafts = min(1, len(model.mtp_modules)) if draft_tokens is None else draft_tokens
    return LLM(model, tokenizer=tokenizer, draft_tokens=drafts)


@app.command()
def generate(
    folder: Path = typer.Argument(help="Hugging Face folder of a model, with its tokenizer"),
    prompt: str = typer.Option(None, "--prompt", help="text to continue; with --suffix, what comes before"),
    suffix: str = typer.Option(None, "--suffix", help="fill in the middle: the text that comes after"),
    source: Path = typer.Option(
        None, "--input", help='instead of --prompt: JSONL, {"prompt": ...} a line, with own options as keys'
    ),
    target: Path = typer.Option(
        None, "--output", help="with --input: JSONL of the answers; run again after a kill to go on"
    ),
    max_tokens: int = typer.Option(64, "--max-tokens", min=1, help="tokens to generate"),
    temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0: the likeliest token each time"),
    top_p: float = typer.Option(1.0, "--top-p", help="share of the probability to draw from; 1: all"),
    top_k: int = typer.Option(0, "--top-k", min=0, help="how many of the likeliest to draw from; 0: all"),
    seed: int = typer.Option(0, "--seed", min=0, help="of the sampling"),
    stop: list[str] = typer.Option([], "--stop", help="text that ends the answer; may be given again"),
    draft_tokens: int = typer.Option(None, "--draft-tokens", min=0, max=8, help=DRAFTS),
    quantize: str = typer.Option(None, "--quantize", help=QUANTIZE),
) -> None:
    """Print what a model writes after a prompt (or between --prompt and --suffix)."""
    from dsv3.common.errors import UserError
    from dsv3.serve.params import SamplingParams

    if (prompt is None) == (source is None):
        raise UserError("give either --prompt or --input, one of them")
    if (source is None) != (target is None):
        raise UserError("--input and --output belong together: give both or neither")
    if source is not None and suffix is not None:
        raise UserError('--suffix goes with --prompt; in a file, give "suffix" on the line')
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop
    )
    if source is not None:
        from dsv3.serve.batch import generate_file, read_requests

        read_requests(source, params)  # a bad line is refused before the model is loaded
        llm = open_llm(folder, draft_tokens, quantize)
        model = str(folder.resolve()) + (f" {quantize}" if quantize else "")
        count = generate_file(llm, source, target, params, model)
        typer.echo(f"{count} answers in {target}")
        return
    llm = open_llm(folder, draft_tokens, quantize)
    typer.echo(llm.generate([llm.encode(prompt, suffix)], params)[0].text)
