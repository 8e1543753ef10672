"""The page's sentences follow its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv3.bench.end_to_end.figures import SHOWN, WATCHED, _spent, ends
from dsv3.bench.end_to_end.page import write
from dsv3.config import recipe as recipes
from dsv3.config.end_to_end import EndToEndRecipe

ROOT = Path(__file__).parents[3]


def found(**accuracy: list[list[float]]) -> dict[str, Any]:
    """Figures of two seeds; ``accuracy``: of each task by stage and seed."""
    return {
        "seeds": [0, 1],
        "parameters": 1_000_000,
        "questions": {task: 7 for task in accuracy},
        "accuracy": {task: dict(zip(SHOWN, rows)) for task, rows in accuracy.items()},
        "watched": {name: [[0.0, 1.0], [0.5, 2.0]] for name in WATCHED},
        "difference": 1e-6,
        "trained": {stage: {"step": 3, "tokens": 5000} for stage in SHOWN},
        "distilled": [{"kept": 5, "attempts": 16}, {"kept": 7, "attempts": 16}],
        "quantized": {"grpo": {"bytes": 4_000_000, "accuracy": {task: 0.5 for task in accuracy}}},
        "served": {"question": "What?", "answer": "That", "right": "This"},
        "minutes": {"sft": 1.25},
        "cpu_minutes": 9.0,
        "wall_minutes": 5.0,
        "machine": {"cpu": "a processor", "cores": 2, "torch": "2"},
    }


def page(folder: Path, figures: dict[str, Any]) -> str:
    recipe = recipes.load(EndToEndRecipe, ROOT / "recipes" / "pipeline-fast.yaml").model_copy(
        update={"tasks": list(figures["accuracy"]), "notes": ["a note"]}
    )
    return write(recipe, figures, folder).read_text(encoding="utf-8")


def test_what_rises_and_what_does_not(tmp_path: Path) -> None:
    up = [[0.0, 0.0], [0.1, 0.2], [0.1, 0.1], [0.3, 0.4], [0.5, 0.8]]
    down = [[0.0, 0.0], [0.2, 0.2], [0.3, 0.5], [0.1, 0.2], [0.5, 0.5]]
    text = page(tmp_path, found(up=up, down=down))
    assert "rises at every stage on 1 of 2 tasks (`up`)" in text
    assert "What did not rise: `down` from SFT to distillation (-5.0)." in text
    assert "gains most on `up`: +50.0 points.\nGRPO alone" in text
    assert "began with: +30.0 on `up`, +35.0 on `down`." in text
    assert "SFT alone:\n+25.0 on `up`, -25.0 on `down`." in text  # the control is no stage of the way
    cells = "15.0 (10.0 - 20.0) | 10.0 (10.0 - 10.0) | 35.0 (30.0 - 40.0) | 65.0 (50.0 - 80.0)"
    assert f"| `up` | 7 | 0.0 | {cells} |" in text
    assert "| SFT | 64 solved examples a task, answers without steps | 3 | 5K | 1.2 |" in text
    assert "those and 6 answers more" in text and "* a note" in text and "4.0 MB" in text


def test_too_little_is_said(tmp_path: Path) -> None:
    text = page(tmp_path, found(flat=[[0.0, 0.0], [0.5, 0.5], [0.7, 0.7], [0.6, 0.6], [0.61, 0.61]]))
    assert "+11.0 points, less than the 20 looked for" in text
    assert "No stage lost anything" in text


def test_ends_are_means_of_five_steps() -> None:
    assert ends([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.0, 4.0)
    assert ends([1.0, 3.0]) == (2.0, 2.0)


def test_minutes_are_of_one_seed() -> None:
    lines = [
        {"stage": "tokenizer and pre-training", "cpu_seconds": 60.0, "seconds": 20.0},
        {"stage": "seed 0: SFT", "cpu_seconds": 60.0, "seconds": 20.0},
        {"stage": "seed 1: SFT", "cpu_seconds": 120.0, "seconds": 20.0},
        {"stage": "seed 0: SFT: held-out questions", "cpu_seconds": 30.0, "seconds": 20.0},
        {"stage": "seed 0: distillation", "cpu_seconds": 30.0, "seconds": 20.0},
        {"stage": "seed 0: SFT on it", "cpu_seconds": 30.0, "seconds": 20.0},
    ]
    spent = _spent(lines, 2)
    assert spent["minutes"] == pytest.approx({"pretrain": 1.0, "sft": 1.5, "again": 0.5})
    assert spent["cpu_minutes"] == pytest.approx(5.5)
    assert spent["wall_minutes"] == pytest.approx(2.0)
