"""Claim 13: read from the runs of ``dsv3 bench end-to-end``: what distillation and GRPO are worth."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from dsv3.bench.claims.claim import Claim, Measured, Options
from dsv3.bench.claims.spread import above, spread
from dsv3.bench.end_to_end.figures import ends, gather
from dsv3.bench.end_to_end.plots import draw_accuracy
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.end_to_end import EndToEndRecipe

FOLDER = Path(EndToEndRecipe.model_fields["out"].default)
GAINED = {"distillation": ("control", "again"), "GRPO": ("again", "grpo")}  # each against its control
LENGTH = "completions/mean_length"


def measure(options: Options) -> Measured:
    """Points of held-out accuracy gained by each stage, seed by seed, and the length of answers."""
    path = FOLDER / "recipe.yaml"
    try:
        found = gather(recipes.load(EndToEndRecipe, path))
    except FileNotFoundError as error:
        raise UserError(
            f"claim post reads {FOLDER}, which has no {error.filename}: run `dsv3 bench end-to-end` first"
        ) from None
    accuracy = found["accuracy"]
    gained = {name: gains(accuracy, *stages) for name, stages in GAINED.items()}
    lengths = [ends(values) for values in found["watched"][LENGTH]]
    before, after = (mean(row[end] for row in lengths) for end in (0, 1))
    return Measured(
        f"distillation {spread(gained['distillation'], ' points', 1)} above as much SFT, GRPO"
        f" {spread(gained['GRPO'], ' points', 1)}, means of {len(accuracy)} tasks; answers of {before:.1f}"
        f" tokens at the start of GRPO, {after:.1f} at its end",
        "; ".join(f"{name}: {above(points)}" for name, points in gained.items()),
        ("task", "SFT", "SFT for as long", "distillation", "GRPO"),
        [
            (task, *(f"{100 * mean(stages[stage]):.1f} %" for stage in ("sft", "control", "again", "grpo")))
            for task, stages in accuracy.items()
        ],
        {key: found[key] for key in ("accuracy", "questions", "seeds")},
    )


def gains(accuracy: dict[str, dict[str, list[float]]], before: str, after: str) -> list[float]:
    """Of each seed: points of one stage above another, mean over tasks."""
    tasks = [[b - a for a, b in zip(stages[before], stages[after])] for stages in accuracy.values()]
    return [100 * mean(values) for values in zip(*tasks)]


def draw(data: dict[str, Any], path: Path) -> None:
    """Accuracy by stage and task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_accuracy(data, path)


POST = Claim(
    13, "post",
    "Distilling from a model that reasons and reinforcing by rules raise accuracy where answers can be"
    " verified, and answers grow longer (MATH-500 +8.6, LiveCodeBench +6.3 points by distillation).",
    "5.4.1, table 9",
    "`dsv3 bench end-to-end`: a tiny model, three verifiable tasks, every stage from several seeds on one"
    " pre-trained model",
    "Tasks a tiny model can learn have short answers and no reasoning to make longer, so length says little"
    " here; what is distilled is the model's own accepted answers, not a stronger one's.",
    measure, draw,
)  # fmt: skip
