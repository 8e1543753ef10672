"""Nothing is lost: checkpoints of any layout go on in any other, and ranks are really killed and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dsv3.checkpoint.run import verify
from dsv3.train.run import read_lines
from tests.parallel.layouts import tree
from tests.parallel.ranks import free_port, run_ranks
from tests.train.conftest import prepare_words

STEPS = 8


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_words(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never interrupted, its checkpoints kept."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run_ranks(0, "tests.parallel.test_faults:train", [[recipe(data, out), None]])
    return out


def recipe(data: Path, out: Path, **parallel: Any) -> dict[str, Any]:
    changes = {"checkpoint": {"every": 2, "keep": 10}, "parallel": parallel}
    return tree(str(data), str(out), STEPS, changes)


def train(runs: list[tuple[dict[str, Any], str | None]]) -> None:
    """In a rank: recipes, each with the checkpoint it goes on from."""
    from dsv3.config import recipe as recipes
    from dsv3.config.train import PretrainRecipe
    from dsv3.train.pretrain import pretrain

    for run, resume in runs:
        pretrain(recipes.validate(PretrainRecipe, run), resume)


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(out / "metrics.jsonl") if "loss" in line}


def same_losses(out: Path, unbroken: Path, first: int = 1) -> None:
    found, wanted = losses(out), losses(unbroken)
    assert list(found) == list(range(first, STEPS + 1))
    for step, loss in found.items():
        assert loss == pytest.approx(wanted[step], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_layout(data: Path, unbroken: Path, tmp_path: Path) -> None:
    """One process to 4 (pipeline and experts), 4 to 2 (FSDP2; a context), 2 to 1, and 4 back to 1."""
    run_ranks(
        4,
        "tests.parallel.test_faults:train",
        [
            [
                recipe(data, tmp_path / "four", pipeline=2, expert=2, schedule="1f1b"),
                str(unbroken / "checkpoints/step-000002"),
            ]
        ],
    )
    same_losses(tmp_path / "four", unbroken, 3)
    for folder in (tmp_path / "four/checkpoints").iterdir():
        verify(folder)
    run_ranks(
        2,
        "tests.parallel.test_faults:train",
        [
            [
                recipe(data, tmp_path / "two", expert=2, zero=3),
                str(tmp_path / "four/checkpoints/step-000004"),
            ],
            [recipe(data, tmp_path / "shards"), str(unbroken / "checkpoints/step-000006")],
            [recipe(data, tmp_path / "parts", context=2), str(tmp_path / "four/checkpoints/step-000006")],
        ],
    )
    same_losses(tmp_path / "two", unbroken, 5)
    same_losses(tmp_path / "shards", unbroken, 7)
    same_losses(tmp_path / "parts", unbroken, 7)
    run_ranks(
        0,
        "tests.parallel.test_faults:train",
        [
            [recipe(data, tmp_path / "one"), str(tmp_path / "two/checkpoints/step-000006")],
            [recipe(data, tmp_path / "again"), str(tmp_path / "four/checkpoints/step-000004")],
        ],
    )
    same_losses(tmp_path / "one", unbroken, 7)
    same_losses(tmp_path / "again", unbroken, 5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_ranks_go_on_from_one_and_back(data: Path, unbroken: Path, tmp_path: Path) -> None:
    wide = recipe(data, tmp_path / "eight", data_replicate=2, expert=2)
    wide["batch"] = {"sequences": 16, "micro_sequences": 8}
    checkpoint = str(unbroken / "checkpoints/step-000002")
    run_ranks(8, "tests.parallel.test_faults:train", [[wide, checkpoint]], timeout=600)
    same_losses(tmp_path / "eight", unbroken, 3)
    again = [[recipe(data, tmp_path / "one"), str(tmp_path / "eight/checkpoints/step-000004")]]
    run_ranks(0, "tests.parallel.test_faults:train", again)
    same_losses(tmp_path / "one", unbroken, 5)


def launch(path: Path, *options: str) -> subprocess.Popen:
    """``torchrun -m dsv3 pretrain`` with two processes."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options),
            *("--master-port", str(free_port()), "-m", "dsv3", "pretrain", str(path), "--resume", "auto"),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def workers(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The ranks of a launcher, by rank."""
    found = [p for p in psutil.Process(launcher.pid).children() if "dsv3" in p.cmdline()]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def wait_until(reached: Any, process: subprocess.Popen) -> None:
    for _ in range(9000):
        if reached():
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early:\n{process.communicate()[0]}")
        time.sleep(0.01)
    raise AssertionError("nothing happened for 90 seconds")


def last_step(out: Path) -> int:
    return max(losses(out), default=0) if (out / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("moment", ["in a step", pytest.param("in a save", marks=pytest.mark.slow)])
def test_a_killed_rank_and_torchrun_starts_again(
    data: Path, unbroken: Path, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "run"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, out, expert=2)))
    launcher = launch(path, "--max-restarts", "1")

    def reached() -> bool:
        if last_step(out) < 3 or not any(out.glob("checkpoints/step-*")):
            return False
        return moment == "in a step" or any(out.glob("checkpoints/.tmp-*"))

    wait_until(reached, launcher)
    workers(launcher)[1].send_signal(signal.SIGKILL)
    text = launcher.communicate(timeout=150)[0]
    assert launcher.returncode == 0, text
    assert "resumed from step-" in (out / "log.txt").read_text()
    same_losses(out, unbroken)
    for folder in (out / "checkpoints").glob("step-*"):
        verify(folder)


@pytest.mark.slow
def test_a_hung_rank_is_named(data: Path, tmp_path: Path) -> None:
    """A rank that no longer runs: the other ends after the time-out and says which."""
    out = tmp_path / "run"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, out, expert=2, timeout_seconds=6)))
    launcher = launch(path)
    wait_until(lambda: last_step(out) >= 2, launcher)
    hung = workers(launcher)[1]
    hung.suspend()
    try:
        text = launcher.communicate(timeout=120)[0]
    finally:
        if hung.is_running():
            hung.kill()
    assert launcher.returncode != 0
    assert "dsv3: rank 1 does not answer after step" in text
    assert "--resume auto goes on from the last checkpoint" in text


@pytest.mark.slow
def test_sigterm_stops_all_ranks_after_the_same_step(data: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, out)))
    launcher = launch(path)
    wait_until(lambda: last_step(out) >= 2, launcher)
    workers(launcher)[1].send_signal(signal.SIGTERM)
    text = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 0, text
    assert "stopped by a signal to another rank" in (out / "log.txt").read_text()
    again = launch(path)
    assert again.communicate(timeout=120) and again.returncode == 0
    same_losses(out, unbroken)
