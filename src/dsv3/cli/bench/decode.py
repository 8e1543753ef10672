"""``dsv3 bench decode``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dsv3.cli.bench.group import app


@app.command()
def decode(
    vs: str = typer.Option("transformers,llama.cpp", "--vs", help="peers; transformers:eager is one too"),
    model: Path = typer.Option(
        None, "--model", help="BF16 folder; default: runs/bench-decode/v3-1b, random weights, made"
    ),
    tokenizer: Path = typer.Option(
        None, "--tokenizer", help="folder whose tokenizer the made model gets (llama.cpp wants one it knows)"
    ),
    prompt_tokens: int = typer.Option(128, "--prompt-tokens", min=1, help="tokens of a prompt"),
    tokens: int = typer.Option(64, "--tokens", min=2, help="tokens of an answer"),
    batch: str = typer.Option("1,4,16", "--batch", help="answers at once"),
    formats: str = typer.Option(
        "bf16,int8,int4", "--formats", help="made beside the model; peers: the same or the nearest"
    ),
    rounds: int = typer.Option(3, "--rounds", min=1, help="of each, in turns"),
    threads: int = typer.Option(0, "--threads", min=0, help="CPU threads of each; 0: torch's choice"),
    llama_cpp: Path = typer.Option(
        None,
        "--llama-cpp",
        envvar="DSV3_LLAMA_CPP",
        help="folder of llama.cpp, built; its files are made too",
    ),
    mtp: Path = typer.Option(
        None, "--mtp", help="instead: a trained model, its MTP drafts on beside off, one answer at a time"
    ),
    data: Path = typer.Option("data/tiny", "--data", help="prepared data whose held-out text --mtp reads"),
    prompts: int = typer.Option(8, "--prompts", min=1, help="prompts of each source for --mtp"),
    draft_tokens: int = typer.Option(1, "--draft-tokens", min=1, max=8, help="drafts a step for --mtp"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Reading prompts and decoding, tokens a second: BF16, INT8, INT4, greedy, the same threads for all."""
    import torch

    from dsv3.bench import decode as decoding
    from dsv3.common.errors import UserError

    threads = threads or torch.get_num_threads()
    if mtp is not None:
        from dsv3.bench import drafts

        found = drafts.held_out(data, mtp, prompts, prompt_tokens)
        result = drafts.bench(mtp, found, tokens, draft_tokens, rounds, threads)
        typer.echo(json.dumps(result, indent=2) if as_json else drafts.report(result))
        return
    peers = decoding.choices(vs, "--vs", decoding.PEERS)
    kinds = decoding.choices(formats, "--formats", decoding.FORMATS)
    if not kinds:
        raise UserError(f"--formats ({formats}) names none; there are {', '.join(decoding.FORMATS)}")
    batches = decoding.sizes(batch)
    if model is None:
        model = decoding.default_model(tokenizer)
    plan = decoding.Plan(model, prompt_tokens, tokens, batches, threads)
    result = decoding.bench(plan, kinds, peers, rounds, llama_cpp)
    typer.echo(json.dumps(result, indent=2) if as_json else decoding.report(result))
