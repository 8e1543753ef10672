"""``dsv3 reward`` and ``dsv3 judge``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsv3.cli.recipe_help import OVERRIDES, command, say_end

if TYPE_CHECKING:
    from dsv3.config.recipe import Recipe

app = typer.Typer()


def _recipe() -> type[Recipe]:
    from dsv3.config.reward import RewardRecipe

    return RewardRecipe


@app.command(cls=command(_recipe), context_settings=OVERRIDES)
def reward(
    ctx: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe, e.g. recipes/reward-tiny.yaml"),
    resume: str = typer.Option(
        None, "--resume", help="auto: go on from the newest whole checkpoint of out; or a checkpoint's folder"
    ),
) -> None:
    """Train a reward model with a scalar head on pairs of a better and a worse answer."""
    from dsv3.config.recipe import load
    from dsv3.config.reward import RewardRecipe

    read = load(RewardRecipe, recipe, ctx.args)
    from dsv3.train.reward import reward as run  # torch: only for a recipe that is whole

    finished = run(read, resume) is not None
    grpo = f"dsv3 grpo recipes/grpo-tiny.yaml --rewards '[{{function: model:{read.out}/model}}]'"
    say_end(read, finished, grpo)


@app.command()
def judge(
    pairs: list[Path] = typer.Argument(help="files or folders of pairs: prompt, chosen, rejected"),
    model: str = typer.Option(
        ..., help="folder of a model; with --base-url, the name the server knows it by"
    ),
    base_url: str = typer.Option(None, help="an OpenAI-compatible server, up to and with /v1"),
    votes: int = typer.Option(4, min=1, help="judgements an answer; their mean is its score"),
    tries: int = typer.Option(2, min=1, help="times an answer is judged whose judgements cannot be read"),
    temperature: float = typer.Option(
        0.7, min=0.0, help="of the judgements; 0: the likeliest token each time"
    ),
    max_tokens: int = typer.Option(512, min=1, help="tokens a judgement"),
    count: int = typer.Option(None, min=1, help="only so many pairs, the first"),
    out: Path = typer.Option(None, help="write every vote there, JSONL"),
    as_json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Let a model judge pairs, reasoning before each score: how often does it prefer the better answer?"""
    from dsv3.common.files import write_atomic
    from dsv3.config.distill import ExpertSection
    from dsv3.config.recipe import validate
    from dsv3.evaluate.judge import Judge, judge_pairs
    from dsv3.evaluate.preferences import read_rows

    rows = read_rows([str(path) for path in pairs])[:count]
    kind = "endpoint" if base_url else "engine"
    options = validate(ExpertSection, {"kind": kind, "model": model, "base_url": base_url})
    opened = Judge.open(options, votes, temperature, max_tokens, tries=tries)
    found, judged = judge_pairs(opened, rows)
    unread = sum(row[name] is None for row in judged for name in ("chosen_score", "rejected_score"))
    if out is not None:
        write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged))
    if as_json:
        report = {
            "accuracy": found.value, "standard_error": found.standard_error, "pairs": found.pairs,
            "decided": found.decided, "unreadable": unread / (2 * len(judged)),
        }  # fmt: skip
        typer.echo(json.dumps(report))
        return
    typer.echo(
        f"{found.value:.1%} +- {found.standard_error:.1%} of {found.pairs} pairs right"
        f" ({found.decided} decided; {unread} of {2 * len(judged)} answers without a readable judgement)"
    )
