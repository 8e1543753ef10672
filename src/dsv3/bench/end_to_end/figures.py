"""What a run of `dsv3 bench end-to-end` came to, read from its folder: JSON, from which the page is made."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from dsv3.bench.end_to_end.stages import AFTER, CONTROL
from dsv3.config.end_to_end import EndToEndRecipe
from dsv3.config.model import ModelConfig
from dsv3.plan.params import counts
from dsv3.train.run import read_lines

STAGES = {"pretrain": "pre-training", **AFTER}  # each from the one before
SHOWN = {"pretrain": "pre-training", "sft": AFTER["sft"], **CONTROL, **AFTER}
WATCHED = {
    "reward": "reward",
    "kl": "KL to the start (nats a token)",
    "entropy": "entropy (nats a token)",
    "completions/mean_length": "tokens an answer",
}
PARTS = {  # a stage's steps, as they are named where their time is written
    "tokenizer and pre-training": "pretrain", "SFT": "sft", "distillation": "again", "SFT on it": "again",
    "SFT for longer": "control", "GRPO": "grpo",
}  # fmt: skip
ENDS = 5  # steps at each end of a GRPO run that a figure is the mean of


def gather(recipe: EndToEndRecipe) -> dict[str, Any]:
    """All figures of a finished run.

    ``accuracy``: task -> stage -> a number a seed (pre-training's is one model's, the same for all).
    ``watched``: GRPO's metrics, name -> seed -> a number a step. ``quantized``: format -> size and accuracy.
    """
    out = Path(recipe.out)
    seeds = [out / f"seed-{seed}" for seed in recipe.seeds]
    first = _results(out / "pretrain")
    accuracy, questions = {}, {}
    for task in recipe.tasks:
        one = first[task]["accuracy"]
        questions[task] = first[task]["n"]
        accuracy[task] = {"pretrain": [one] * len(seeds)} | {
            stage: [_results(seed / stage)[task]["accuracy"] for seed in seeds] for stage in AFTER | CONTROL
        }
    runs = [_steps(seed / "grpo") for seed in seeds]
    config = ModelConfig.from_pretrained(out / "pretrain" / "model")
    return {
        "seeds": recipe.seeds,
        "parameters": counts(config).trained,
        "questions": questions,
        "accuracy": accuracy,
        "watched": {name: [[line[name] for line in lines] for lines in runs] for name in WATCHED},
        "difference": max(line["sampling/sampling_logp_difference/max"] for lines in runs for line in lines),
        "trained": {stage: _trained(out, seeds, stage) for stage in SHOWN},
        "distilled": [json.loads((seed / "distill" / "report.json").read_text()) for seed in seeds],
        "quantized": {
            kind: {
                "bytes": sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")),
                "accuracy": {task: one["accuracy"] for task, one in _results(folder).items()},
            }
            for kind, folder in [("grpo", seeds[0] / "grpo"), *((k, seeds[0] / k) for k in recipe.quantize)]
        },
        "served": json.loads((seeds[0] / "answer.json").read_text(encoding="utf-8")),
        **_spent(read_lines(out / "spent.jsonl"), len(seeds)),
        "machine": json.loads((out / "machine.json").read_text(encoding="utf-8")),
    }


def ends(values: list[float]) -> tuple[float, float]:
    """Means of the first and the last steps of a run."""
    few = min(ENDS, len(values))
    return mean(values[:few]), mean(values[-few:])


def _results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval" / "results.json").read_text())["tasks"]
    return found


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "metrics.jsonl") if line.get("reward") is not None]


def _trained(out: Path, seeds: list[Path], stage: str) -> dict[str, float]:
    """Steps and tokens of a stage, of one seed (the mean of all where they differ)."""
    folders = [out / stage] if stage == "pretrain" else [seed / stage for seed in seeds]
    last = [
        [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line][-1] for folder in folders
    ]
    return {name: mean(line[name] for line in last) for name in ("step", "tokens")}


def _spent(lines: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """``minutes`` of processor time by stage, of one seed; ``cpu_minutes``, ``wall_minutes`` of all."""
    minutes: dict[str, float] = {}
    for line in lines:
        stage = PARTS.get(line["stage"].rpartition(": ")[2])
        if stage is not None:
            share = 1 if stage == "pretrain" else seeds
            minutes[stage] = minutes.get(stage, 0.0) + line["cpu_seconds"] / 60 / share
    return {
        "minutes": minutes,
        "cpu_minutes": sum(line["cpu_seconds"] for line in lines) / 60,
        "wall_minutes": sum(line["seconds"] for line in lines) / 60,
    }
