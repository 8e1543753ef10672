"""``dsv3 chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.generate import DRAFTS, QUANTIZE, open_llm

if TYPE_CHECKING:
    from dsv3.serve.llm import LLM
    from dsv3.serve.params import SamplingParams

app = typer.Typer()


@app.command()
def chat(
    folder: Path = typer.Argument(help="Hugging Face folder of a model, with its tokenizer"),
    system: str = typer.Option(None, "--system", help="system prompt"),
    max_tokens: int = typer.Option(512, "--max-tokens", min=1, help="tokens an answer"),
    temperature: float = typer.Option(0.6, "--temperature", min=0.0, help="0: the likeliest token each time"),
    top_p: float = typer.Option(0.95, "--top-p", help="share of the probability to draw from; 1: all"),
    seed: int = typer.Option(None, "--seed", min=0, help="of the sampling; not given: new ones"),
    draft_tokens: int = typer.Option(None, "--draft-tokens", min=0, max=8, help=DRAFTS),
    quantize: str = typer.Option(None, "--quantize", help=QUANTIZE),
    speed: bool = typer.Option(
        False,
        "--speed",
        help="after each answer: tokens/s, and weights read beside the memory's bandwidth",
    ),
) -> None:
    """Talk with a model. Ctrl-C ends an answer, /new a conversation, Ctrl-D or /exit the program."""
    from dsv3.serve.params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    llm = open_llm(folder, draft_tokens, quantize)
    meter = Meter(llm) if speed else None
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if said.strip() == "/exit":
            return
        if said.strip() == "/new":
            messages = list(beginning)
        elif said.strip():
            messages.append({"role": "user", "content": said})
            if meter:
                meter.start()
            _answer(llm, messages, params)
            if meter:
                typer.echo(meter.line(), err=True)


class Meter:
    """What an answer took, beside what the memory could give."""

    def __init__(self, llm: LLM):
        from dsv3.bench.decode_worker import bandwidth, weight_bytes

        self.stats, self.bytes, self.bandwidth = llm.engine.stats, weight_bytes(llm.engine.model), bandwidth()
        self.start()

    def start(self) -> None:
        """An answer begins."""
        self.tokens, self.started = self.stats.completion_tokens, time.perf_counter()

    def line(self) -> str:
        """Of the answer since :meth:`start`, its prompt included."""
        import psutil

        from dsv3.common.progress import human

        tokens, seconds = self.stats.completion_tokens - self.tokens, time.perf_counter() - self.started
        held = psutil.Process().memory_info().rss
        return (
            f"[{tokens} tokens, {tokens / seconds:.2f} a second with the prompt; a token reads"
            f" {human(self.bytes)}B of weights, the memory gives {human(self.bandwidth)}B/s:"
            f" {100 * tokens / seconds * self.bytes / self.bandwidth:.0f} % of it used;"
            f" {human(held)}B in memory]"
        )


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> None:
    """Stream the answer to the last message and add it; a question that cannot be answered is taken back."""
    from dsv3.common.errors import UserError
    from dsv3.data.chat import encode

    assert llm.tokenizer is not None
    text = ""
    try:
        prompt, _ = encode(llm.tokenizer, messages, add_generation_prompt=True)
        for update in llm.stream(prompt, params):
            text += update.text
            typer.echo(update.text, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except UserError as error:
        typer.echo(f"dsv3: {error} (/new begins anew)", err=True)
        messages.pop()
        return
    typer.echo()
    messages.append({"role": "assistant", "content": text})
