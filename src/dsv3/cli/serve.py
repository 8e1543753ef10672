"""``dsv3 serve``: a model behind OpenAI's and DeepSeek's API, with a page to talk to it."""

from __future__ import annotations

from pathlib import Path

import typer

from dsv3.cli.generate import DRAFTS

app = typer.Typer()


@app.command()
def serve(
    folder: Path = typer.Argument(help="Hugging Face folder of a model, with its tokenizer"),
    host: str = typer.Option("127.0.0.1", "--host", help="address to listen on; 0.0.0.0: the whole network"),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="0: any that is free"),
    model_name: str = typer.Option(
        None, "--model-name", help="what clients call it; default: the folder's name, of RUN/model the run's"
    ),
    quantize: str = typer.Option(None, "--quantize", help="keep the weights as: fp8, int8 or int4"),
    dtype: str = typer.Option(None, "--dtype", help="compute in float32 or bfloat16; default: as stored"),
    device: str = typer.Option("cpu", "--device", help="cpu or cuda"),
    draft_tokens: int = typer.Option(None, "--draft-tokens", min=0, max=8, help=DRAFTS),
    max_batch: int = typer.Option(16, "--max-batch", min=1, help="answers made at once"),
    max_batch_tokens: int = typer.Option(512, "--max-batch-tokens", min=1, help="tokens computed a step"),
    max_length: int = typer.Option(
        None, "--max-length", min=2, help="tokens of prompt and answer; default: what the model was made for"
    ),
    cache_tokens: int = typer.Option(
        None, "--cache-tokens", min=16, help="tokens the cache holds; default: a quarter of the free memory"
    ),
    cache_dtype: str = typer.Option("auto", "--cache-dtype", help="float32, bfloat16, fp8 or auto"),
    max_queue: int = typer.Option(64, "--max-queue", min=0, help="answers that may wait; beyond: 429"),
    max_body: int = typer.Option(8 << 20, "--max-body", min=1024, help="bytes of a request"),
    request_seconds: float = typer.Option(600, "--request-seconds", min=0.01, help="an answer is cut after"),
    drain_seconds: float = typer.Option(
        30, "--drain-seconds", min=0, help="how long open answers go on after SIGTERM"
    ),
    api_key_file: Path = typer.Option(
        None, "--api-key-file", help="keys, one a line; DSV3_API_KEY holds one too; none: everybody may ask"
    ),
    cors_origin: list[str] = typer.Option(
        [], "--cors-origin", help="web site that may ask; may be given again"
    ),
    log_level: str = typer.Option("info", "--log-level", help="debug, info, warning or error"),
) -> None:
    """Serve a model over HTTP; SIGTERM or Ctrl-C lets open answers finish."""
    from dsv3.checkpoint.hf import load, read_config
    from dsv3.common.errors import UserError
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.serve.api import logs
    from dsv3.serve.api.app import create_app
    from dsv3.serve.api.limits import read_keys
    from dsv3.serve.api.server import Listener, bind
    from dsv3.serve.api.settings import Settings
    from dsv3.serve.engine import Engine
    from dsv3.serve.options import Options

    levels = ("debug", "info", "warning", "error")
    if log_level not in levels:
        raise UserError(f"--log-level ({log_level!r}) must be one of {', '.join(levels)}")
    whole = folder.resolve()
    name = whole.parent.name if whole.name == "model" else whole.name
    settings = Settings(
        model_name=model_name or name, api_keys=read_keys(api_key_file), max_queue=max_queue,
        max_body=max_body, request_seconds=request_seconds, drain_seconds=drain_seconds,
        cors_origins=cors_origin,
    )  # fmt: skip
    Options(draft_tokens or 0, max_batch, max_batch_tokens, max_length, cache_tokens, cache_dtype)
    longest = read_config(folder).max_position_embeddings
    if max_length is not None and max_length > longest:
        raise UserError(
            f"--max-length ({max_length}) exceeds the model's max_position_embeddings ({longest})"
        )
    tokenizer = Tokenizer.load(folder)
    listening = bind(host, port)
    logs.set_up(log_level)
    model = load(folder, dtype, device, quantize)
    drafts = min(1, len(model.mtp_modules)) if draft_tokens is None else draft_tokens
    options = Options(drafts, max_batch, max_batch_tokens, max_length, cache_tokens, cache_dtype)
    api = create_app(Engine(model, tokenizer, options), settings)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"
    typer.echo(f"{settings.model_name} at {url}/v1, page {url}/, until Ctrl-C or SIGTERM. To try it:")
    key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
    typer.echo(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key}"
        ' -d \'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}\''
    )
    Listener(api, settings.drain_seconds).run([listening])
