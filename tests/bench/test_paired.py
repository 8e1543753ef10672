"""Training runs in pairs: their progress after a kill, and one that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsv3.bench.paired import Run, train
from dsv3.common.errors import Failure


def run_of(tmp_path: Path, steps: list[int]) -> Run:
    folder = tmp_path / "seed-0" / "fp8"
    folder.mkdir(parents=True)
    lines = [f'{{"step": {step}, "loss": 1.0}}\n' for step in steps]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return Run("fp8", 0, folder)


def test_steps_done_twice_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed at step 6, it went on from the checkpoint of step 4."""
    run = run_of(tmp_path, [1, 2, 3, 4, 5, 6, 5, 6, 7, 8])
    train([run], 8, "data", 1, "ablation", words_of=lambda run: [sys.executable, "-c", ""])
    assert "100% 8/8 steps" in capsys.readouterr().err


def test_an_estimate_of_steps_gives_way_to_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expected to take 8 steps: one run takes 10, another 5."""
    runs = [run_of(tmp_path / name, list(range(1, n + 1))) for name, n in (("long", 10), ("short", 5))]
    train(runs, 8, "data", 2, "rcp", words_of=lambda run: [sys.executable, "-c", ""])
    assert "100% 15/15 steps" in capsys.readouterr().err


def test_a_run_that_fails_names_its_log(tmp_path: Path) -> None:
    run = run_of(tmp_path, [1])
    with pytest.raises(Failure, match=rf"fp8 failed; see {run.folder}.log"):
        train([run], 8, "data", 1, "ablation", words_of=lambda run: [sys.executable, "-c", "1 / 0"])
    assert "ZeroDivisionError" in Path(f"{run.folder}.log").read_text()
