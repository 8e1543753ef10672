"""Paired differences beside numpy, and their picture."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dsv3.common.errors import UserError
from dsv3.evaluate.benchmarks.compare import certain, compare, draw
from dsv3.evaluate.benchmarks.statistics import mean, paired


def folder(path: Path, scores: dict[str, float], task: str = "t:2") -> Path:
    path.mkdir()
    lines = [{"task": task, "model": {}}]
    lines += [{"id": key, "digest": key, "scores": {"acc": value}} for key, value in scores.items()]
    (path / "t-2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_difference_question_by_question(tmp_path: Path) -> None:
    rng = random.Random(0)
    first = {str(n): float(rng.random() < 0.4) for n in range(200)}
    second = {key: max(value, float(rng.random() < 0.1)) for key, value in reversed(first.items())}
    del second["7"]
    (row,) = compare(folder(tmp_path / "a", first), folder(tmp_path / "b", {**second, "new": 1.0}))
    both = [key for key in first if key != "7"]
    change = np.array([second[key] - first[key] for key in both])
    assert (row["task"], row["score"], row["n"]) == ("t:2", "acc", 199)
    assert row["difference"] == pytest.approx(change.mean())
    half = 1.96 * change.std(ddof=1) / len(both) ** 0.5
    assert (row["low"], row["high"]) == pytest.approx((change.mean() - half, change.mean() + half), rel=1e-3)
    assert (row["up"], row["down"]) == ((change > 0).sum(), (change < 0).sum())
    assert certain(row) and row["first"] == pytest.approx(np.mean([first[key] for key in both]))
    # Unpaired, the same difference would be lost in the noise.
    alone = (mean(list(first.values())).stderr or 0) ** 2 + (mean(list(second.values())).stderr or 0) ** 2
    assert row["difference"] < 1.96 * alone**0.5
    draw([row], "a", "b", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        first, second = rng.random(100) < 0.3, rng.random(100) < 0.5
        low, high = paired(first.astype(float).tolist(), second.astype(float).tolist()).interval
        covered += low <= 0.2 <= high
    assert 0.92 < covered / 400 < 0.98


def test_a_single_question_has_no_interval(tmp_path: Path) -> None:
    (row,) = compare(folder(tmp_path / "a", {"1": 0.0}), folder(tmp_path / "b", {"1": 1.0}))
    assert row["difference"] == 1 and row["low"] is None and not certain(row)
    draw([row], "a", "b", tmp_path / "plot.png")


def test_folders_without_common_questions_are_refused(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "a", {"1": 0.0}), folder(tmp_path / "b", {"2": 1.0})
    with pytest.raises(UserError, match="share no answered question"):
        compare(one, other)
    with pytest.raises(UserError, match="none is no folder: give two that dsv3 eval"):
        compare(one, tmp_path / "none")
