"""The page of `dsv3 bench end-to-end`: every number on it is read from the run's folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

from dsv3.bench.end_to_end.figures import SHOWN, STAGES, WATCHED, ends
from dsv3.bench.end_to_end.plots import draw_accuracy, draw_watched
from dsv3.common.files import write_atomic
from dsv3.config.end_to_end import EndToEndRecipe

WIDTH = 115  # columns of the page's source
POINTS = 20  # percentage points that SFT to GRPO is to bring on one task at least


def write(recipe: EndToEndRecipe, found: dict[str, Any], folder: Path) -> Path:
    """``pipeline.md`` and ``images/pipeline_*.png`` in ``folder``; returns the page's path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draw_accuracy(found, folder / "images" / "pipeline_accuracy.png")
    draw_watched(found, folder / "images" / "pipeline_grpo.png")
    page = folder / "pipeline.md"
    write_atomic(page, "\n".join(_lines(recipe, found)) + "\n")
    return page


def _lines(recipe: EndToEndRecipe, found: dict[str, Any]) -> Iterator[str]:
    machine, seeds = found["machine"], found["seeds"]
    yield "# The whole way\n"
    yield (
        "Tokenizer, pre-training, SFT, distillation, GRPO, quantisation, server: `make pipeline` does\n"
        "all of it and writes this page from what came out. Killed, it goes on where it was.\n"
        "(`make pipeline FAST=1`: a minute's version of the same, whose figures mean nothing.)\n"
    )
    yield (
        f"{found['parameters'] / 1e6:.1f}M parameters; {machine['cpu']}, {machine['cores']} cores, torch"
        f" {machine['torch']}; seeds {_listed(seeds)} of all that follows\npre-training, which they share."
        " Accuracy is of greedy answers to the same questions of the test split after every\nstage, which no"
        " training draws from.\n"
    )
    yield "## What each stage is taught\n"
    yield from _taught(recipe, found)
    yield "\n## Held-out accuracy\n"
    yield from _accuracy(found)
    yield "\n![accuracy by stage](images/pipeline_accuracy.png)\n"
    yield from _verdict(found)
    yield "\n## GRPO, step by step\n"
    yield from _watched(found)
    yield "\n![reward, KL, entropy and length over the steps](images/pipeline_grpo.png)\n"
    yield "## Quantised and served\n"
    yield from _quantized(recipe, found)
    if recipe.notes:
        yield "\n## What to know\n"
        yield from (f"* {fill(note, WIDTH, subsequent_indent='  ')}" for note in recipe.notes)


def _taught(recipe: EndToEndRecipe, found: dict[str, Any]) -> Iterator[str]:
    trained, tasks = found["trained"], len(recipe.tasks)
    distilled = found["distilled"]
    kept, asked = mean(one["kept"] for one in distilled), tasks * recipe.prompts
    attempts = mean(one["attempts"] for one in distilled)
    taught = {
        "pretrain": f"`{recipe.pretrain.recipe}`: text alone, none of the tasks",
        "sft": f"{recipe.examples} solved examples a task, answers without steps",
        "control": "those again, from SFT, as many rows as distillation has: what more steps alone bring",
        "again": f"those and {kept:.0f} answers more: the SFT model answered {asked} other questions"
        f" {attempts / asked:.0f} times each, and the tasks' verifiers kept the right ones, one a question",
        "grpo": "the verifiers' rewards alone",
    }
    yield "| stage | taught by | steps | tokens | minutes of processor time |"
    yield "|---|---|---|---|---|"
    for stage, name in SHOWN.items():
        steps, tokens = trained[stage]["step"], trained[stage]["tokens"] / 1e3
        yield f"| {name} | {taught[stage]} | {steps:.0f} | {tokens:.0f}K | {_minutes(found, stage)} |"
    yield (
        f"\nMinutes are of one seed. All that was done, the questions after every stage included:"
        f" {found['cpu_minutes']:.0f} minutes, {found['wall_minutes']:.0f} by the clock."
    )


def _minutes(found: dict[str, Any], stage: str) -> str:
    value = found["minutes"].get(stage)
    return "" if value is None else f"{value:.1f}"


def _accuracy(found: dict[str, Any]) -> Iterator[str]:
    worst = 50 / min(found["questions"].values()) ** 0.5
    yield (
        "Per cent: mean of the seeds, and in brackets the lowest and the highest. One seed's figure has a"
        f" standard error of\n{worst:.1f} points at most.\n"
    )
    yield "| task | different questions | " + " | ".join(SHOWN.values()) + " |"
    yield "|---" * (2 + len(SHOWN)) + "|"
    for task, stages in found["accuracy"].items():
        cells = []
        for stage in SHOWN:
            values = [100 * value for value in stages[stage]]
            spread = "" if stage == "pretrain" else f" ({min(values):.1f} - {max(values):.1f})"
            cells.append(f"{mean(values):.1f}{spread}")
        yield f"| `{task}` | {found['questions'][task]} | " + " | ".join(cells) + " |"


def _verdict(found: dict[str, Any]) -> Iterator[str]:
    """Which tasks rise at every stage, what GRPO brings, and every step that brings nothing."""
    accuracy, names = found["accuracy"], list(STAGES)
    rising, flat = [], []
    for task, stages in accuracy.items():
        falls = [
            f"`{task}` from {STAGES[one]} to {STAGES[other]}"
            f" ({100 * (mean(stages[other]) - mean(stages[one])):+.1f})"
            for one, other in itertools.pairwise(names)
            if mean(stages[other]) <= mean(stages[one])
        ]
        flat += falls
        rising += [] if falls else [task]
    gains = _gains(accuracy, "sft", "grpo")
    best = max(gains, key=lambda task: gains[task])
    alone = _gains(accuracy, "again", "grpo")
    yield (
        f"The mean rises at every stage on {len(rising)} of {len(accuracy)} tasks"
        + (f" ({', '.join(f'`{task}`' for task in rising)})." if rising else ".")
    )
    yield (
        f"From SFT to GRPO it gains most on `{best}`: {gains[best]:+.1f} points"
        + ("" if gains[best] >= POINTS else f", less than the {POINTS} looked for")
        + "."
    )
    yield f"GRPO alone, from the model it began with: {_points(alone)}."
    beside = _points(_gains(accuracy, "control", "again"))
    yield f"Distillation, beside as many steps on the examples of SFT alone:\n{beside}."
    yield (
        f"What did not rise: {'; '.join(flat)}."
        if flat
        else "No stage lost anything on any task, in the mean."
    )


def _gains(accuracy: dict[str, Any], start: str, end: str) -> dict[str, float]:
    """Points from one stage to another, in the mean of the seeds, by task."""
    return {task: 100 * (mean(stages[end]) - mean(stages[start])) for task, stages in accuracy.items()}


def _points(gains: dict[str, float]) -> str:
    return ", ".join(f"{gain:+.1f} on `{task}`" for task, gain in gains.items())


def _watched(found: dict[str, Any]) -> Iterator[str]:
    yield "Means over the first and the last five steps, and over the seeds (lowest to highest).\n"
    yield "| | first steps | last steps |"
    yield "|---|---|---|"
    for name, title in WATCHED.items():
        pairs = [ends(values) for values in found["watched"][name]]
        cells = [f"{mean(column):.3g} ({min(column):.3g} - {max(column):.3g})" for column in zip(*pairs)]
        yield f"| {title} | {cells[0]} | {cells[1]} |"
    yield (
        "\nThe engine's log-probabilities of the sampled tokens and those that training computes of the same"
        f" weights are never\nmore than {found['difference']:.1g} apart."
    )


def _quantized(recipe: EndToEndRecipe, found: dict[str, Any]) -> Iterator[str]:
    yield f"The last model of seed {found['seeds'][0]}, by `dsv3 convert`; accuracy in per cent.\n"
    yield "| | weights | " + " | ".join(f"`{task}`" for task in recipe.tasks) + " |"
    yield "|---" * (2 + len(recipe.tasks)) + "|"
    for kind, one in found["quantized"].items():
        cells = [f"{100 * one['accuracy'][task]:.1f}" for task in recipe.tasks]
        name = "as trained" if kind == "grpo" else kind
        yield f"| {name} | {one['bytes'] / 1e6:.1f} MB | {' | '.join(cells)} |"
    served = found["served"]
    yield (
        "\n`dsv3 serve` on the last of these folders, asked through `/v1/chat/completions`:"
        f" *{served['question']}*\nIt answers `{served['answer']}`; the solution is `{served['right']}`."
    )


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
