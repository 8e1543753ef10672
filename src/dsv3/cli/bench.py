"""``dsv3 bench``: measured beside named peers in the same run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import typer

app = typer.Typer(help="Measure beside named peers in the same run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure beside named peers in the same run."""


@app.command()
def train(
    vs: str = typer.Option("transformers", "--vs", help="the peer: transformers"),
    case: str = typer.Option("cpu-63m", "--case", help="cpu-63m (FP32) or gpu-1b (BF16 on CUDA)"),
    steps: int = typer.Option(9, "--steps", min=1, help="counted steps of each"),
    threads: int = typer.Option(0, "--threads", min=0, help="CPU threads of each; 0: torch's choice"),
    compiled: bool = typer.Option(False, "--compile", help="torch.compile our layers (the peer is eager)"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Training steps a second and peak memory: same shape, batch, optimizer and threads, MTP off."""
    from dsv3.bench.train import CASES, bench, report
    from dsv3.common.errors import UserError, nearest

    if vs != "transformers":
        raise UserError(f"--vs ({vs}) is not a peer of this benchmark; use transformers")
    if case not in CASES:
        raise UserError(f"--case ({case}) is unknown{nearest(case, CASES)}; there are {', '.join(CASES)}")
    if CASES[case]["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"--case ({case}) needs a CUDA device, and there is none; use --case cpu-63m")
    peers = [f"{vs}:grouped_mm", f"{vs}:eager"]
    result = bench(case, peers, steps=steps, threads=threads, compiled=compiled)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))


@app.command()
def fp8(
    ablation: bool = typer.Option(
        False, "--ablation", help="train the tiny model in FP32, in FP8, and with each choice undone"
    ),
    memory: bool = typer.Option(False, "--memory", help="activation bytes a token a layer, by precision"),
    out: str = typer.Option("runs/fp8-ablation", "--out", help="folder of the ablation's runs"),
    steps: int = typer.Option(1000, "--steps", min=20, help="steps of each of the ablation's runs"),
    seed: list[int] = typer.Option(
        [0], "--seed", min=0, help="of the ablation's weights and order of data; may be repeated"
    ),
    data: str = typer.Option("data/tiny", "--data", help="prepared data of the ablation"),
    workers: int = typer.Option(2, "--workers", min=1, help="the ablation's runs at once"),
    only: list[str] = typer.Option([], "--only", help="a variation of the ablation; may be repeated"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """FP8 products and training beside BF16 on a GPU; or, on any machine, --ablation and --memory."""
    if ablation:
        from dsv3.bench import fp8_ablation

        result = fp8_ablation.ablation(Path(out), steps, seed, data, workers, only)
        text = fp8_ablation.report(result) + f"\nplot: {Path(out) / 'loss_gap.png'}"
    elif memory:
        from dsv3.bench import fp8_memory

        result = fp8_memory.bench()
        text = fp8_memory.report(result)
    else:
        from dsv3.bench import fp8_gemm

        result = fp8_gemm.bench()
        text = fp8_gemm.report(result)
    typer.echo(json.dumps(result, indent=2) if as_json else text)


@app.command()
def pipeline(
    schedule: str = typer.Option(
        "1f1b,dualpipev", "--schedule", help="one or more of 1f1b, interleaved, zbv, dualpipev, with commas"
    ),
    ranks: int = typer.Option(2, "--ranks", min=2, help="processes of this machine, a thread each"),
    micro_batches: int = typer.Option(8, "--micro-batches", min=1, help="micro-batches a step"),
    steps: int = typer.Option(5, "--steps", min=1, help="counted steps; the fastest is shown"),
    out: Path = typer.Option(
        Path("runs/bench-pipeline"), "--out", help="folder of the traces and the picture"
    ),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Trace real pipeline steps (for Perfetto) and draw them above their simulation."""
    from dsv3.bench.pipeline import bench, report
    from dsv3.parallel.pipeline.cut import stages_of

    names = [name.strip() for name in schedule.split(",")]
    for name in names:
        stages_of(name, 0, ranks)
    result = bench(names, ranks, micro_batches, steps, out)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))


@app.command()
def convert(
    path: str = typer.Option(tempfile.gettempdir(), "--path", help="folder on the disk to be measured"),
    gigabytes: float = typer.Option(
        1.0, "--gigabytes", help="size of the BF16 folder; 4 times that is needed"
    ),
    rounds: int = typer.Option(5, "--rounds", min=1, help="of each, in turns"),
    workers: int = typer.Option(2, "--workers", min=1, help="threads of each"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """dsv3 convert, BF16 to FP8 and back, beside copying the same files: bytes read and written a second."""
    from dsv3.bench.convert import bench, report
    from dsv3.common.errors import UserError

    if not Path(path).is_dir():
        raise UserError(f"--path ({path}) is not a folder; name one on the disk to be measured")
    result = bench(Path(path), gigabytes, rounds, workers)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))


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


@app.command()
def deployment(
    tokens: int = typer.Option(1024, "--tokens", min=1, help="of the prompt that is handed over"),
    model: Path = typer.Option(None, "--model", help="folder of a model whose experts are to be re-placed"),
    slots: int = typer.Option(0, "--slots", min=0, help="places for experts; 0: a quarter more than experts"),
    shards: int = typer.Option(8, "--shards", min=1, help="that the slots are divided among"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Handing an answer from prefill to decode beside a copy in memory; with --model, redundant experts."""
    from dsv3.bench.deployment import bench, report

    result = bench(tokens, model, slots, shards)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))


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


@app.command()
def length(
    lengths: str = typer.Option("1K,2K,4K,8K", "--lengths", help="tokens of the one sequence, K for 1024"),
    threads: int = typer.Option(0, "--threads", min=0, help="CPU threads; 0: torch's choice"),
    plot: Path = typer.Option(None, "--plot", help="PNG file for memory against length"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Peak memory of a step of tiny against the length of its sequence, and the exponent of its growth."""
    from dsv3.bench import length as measured
    from dsv3.cli.niah import tokens

    result = measured.bench(tokens(lengths), threads=threads)
    if plot is not None:
        measured.draw(result, plot)
    typer.echo(json.dumps(result, indent=2) if as_json else measured.report(result))
