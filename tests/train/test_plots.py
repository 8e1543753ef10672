"""What the pictures of a run say; that they are drawn at all is tested with the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from dsv3.train.callbacks.plots import _names, draw_expert_load
from dsv3.train.grpo.plots import draw_reward


def test_the_mtp_modules_layers_are_named() -> None:
    layers = ["1", "2", "3"]
    assert _names([{"mtp_loss": [4.0]}], layers) == {"1": "layer 1", "2": "layer 2", "3": "layer 3 (MTP)"}
    assert _names([{}], layers)["3"] == "layer 3"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, kept to be looked at."""
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: kept.append(self))
    return kept


def whole(ticks: Any) -> bool:
    return all(float(tick).is_integer() for tick in ticks)


def test_experts_and_steps_are_counted_in_whole_numbers(drawn: list[Figure], tmp_path: Path) -> None:
    draw_expert_load([{"tokens": 8, "expert_load": {"1": [1.0] * 16}}], tmp_path / "load.png")
    assert whole(drawn[0].axes[0].get_yticks())
    draw_reward([{"step": n, "reward": 0.5, "reward_std": 0.1} for n in (1, 2, 3)], tmp_path / "reward.png")
    assert whole(drawn[1].axes[0].get_xticks())


def test_a_run_without_tasks_has_no_empty_panel(drawn: list[Figure], tmp_path: Path) -> None:
    line = {"step": 1, "reward": 0.5, "reward_std": 0.1}
    draw_reward([line], tmp_path / "reward.png")
    draw_reward([line, {"step": 1, "accuracy/sums-1": 0.5}], tmp_path / "reward.png")
    assert [len(figure.axes) for figure in drawn] == [1, 2]
