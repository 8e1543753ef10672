"""Steps to target: MLPerf's rule against MLPerf's own checker, and a change that slows convergence fails."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from dsv3.bench import rcp
from dsv3.bench.paired import Run
from dsv3.bench.rcp_points import Points, content, table
from dsv3.common.errors import Failure, UserError
from tests.train.conftest import MODEL, prepared

__all__ = ["prepared"]

REFERENCE = [190, 195, 195, 200, 200, 200, 205, 205, 210, 215]


@pytest.mark.parametrize(("name", "runs"), [("llama31_8b", 10), ("deepseekv3_671b", 3)])
def test_the_fast_side_is_mlperf_s(name: str, runs: int) -> None:
    checker_of = pytest.importorskip("mlperf_logging.rcp_checker.rcp_checker")
    for seed in range(5):
        steps = np.random.default_rng(seed).normal(200, 6, size=2 * runs).round().tolist()
        point = {"Benchmark": name, "BS": 16, "Hyperparams": {}, "Epochs to converge": list(steps)}
        checker = checker_of.RCP_Checker(
            "training", "6.0.0", name, False, io.StringIO(json.dumps({"ref": point}))
        )
        found = checker._find_rcp(16, "full_rcps")
        ours = rcp.check(steps[:runs], steps)
        assert ours.reference == pytest.approx(found["RCP Mean"])
        assert ours.least == pytest.approx(found["Min Epochs"], abs=1e-2)
        for shift in (0.0, -2.0, -4.0, -8.0, 40.0):
            moved = [n + shift for n in steps[:runs]]
            theirs, _ = checker._eval_submission_record(dict(found), list(moved), "")
            assert (rcp.check(moved, steps).verdict != "faster") == theirs


def test_the_quantiles_are_student_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(rcp._T, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.95, freedom), abs=5e-4)


def test_the_reference_passes_itself_and_both_sides_are_bounded() -> None:
    found = rcp.check(REFERENCE, REFERENCE)
    assert found.verdict == "passes" and found.mean == found.reference == 201.25
    assert found.most - found.reference == pytest.approx(found.reference - found.least)
    assert rcp.check([n + 20 for n in REFERENCE[:5]], REFERENCE).verdict == "slower"
    assert rcp.check([n - 30 for n in REFERENCE[:5]], REFERENCE).verdict == "faster"


def test_one_run_may_not_arrive_and_two_may_not() -> None:
    assert rcp.check([195, 200, 200, 205, math.inf], REFERENCE).verdict == "passes"
    assert rcp.check([195, 200, 200, math.inf, math.inf], REFERENCE).verdict == "fails to converge"


def write_run(folder: Path, seed: int, rate: float) -> None:
    """The metrics of a run whose loss falls by a power of rate * steps; noise by seed."""
    random = np.random.default_rng(seed)
    offset = random.normal(0, 0.02)
    lines = []
    for step in range(1, 501):
        lines.append({"step": step, "tokens": 2048 * step, "loss": 5.0, "tokens_per_second": 2048.0})
        if step % 5 == 0:
            loss = 2.0 + 12.5 * (rate * step) ** -0.3 + offset + random.normal(0, 0.005)
            lines.append({"step": step, "tokens": 2048 * step, "validation_loss": loss})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder.parent / rcp.COMMIT).write_text("abc1234\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository's folder with the recipe; training writes a synthetic curve by its learning rate."""
    recipe = Path(rcp.RECIPE).resolve()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "recipes" / recipe.name).write_text(recipe.read_text())
    data = tmp_path / "data/rcp-tiny"
    data.mkdir(parents=True)
    (data / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rcp, "check_content", lambda *words: None)

    def train(runs: list[Run], *rest: object) -> None:
        for run in runs:
            rate = float(run.words[run.words.index("--optimizer.lr") + 1]) if run.words else 2e-3
            write_run(run.folder, run.seed + 100 * bool(run.words), rate / 2e-3)

    monkeypatch.setattr(rcp, "train", train)
    return tmp_path


def dsv3(*words: str) -> tuple[int, str]:
    from dsv3.cli.main import app

    done = CliRunner().invoke(app, ["bench", "rcp", *words])
    error = done.exception
    if isinstance(error, (UserError, Failure)):
        return error.exit_code, str(error)
    return done.exit_code, done.output


def test_half_the_learning_rate_fails_and_the_same_passes(here: Path) -> None:
    code, said = dsv3("--seeds", "10", "--reference")
    assert code == 0 and "written: recipes/rcp-tiny.json, docs/leaderboard.md" in said
    points = json.loads((here / "recipes/rcp-tiny.json").read_text())
    steps = points["reference"]["steps"]
    assert len(steps) == 10 and points["reference"]["commit"] == "abc1234"
    assert points["reference"]["seconds"] == [float(n) for n in steps]  # a second a step, readings left out

    assert dsv3("--seeds", "5")[0] == 0  # the very same runs
    code, said = dsv3("--seeds", "5", "--note", "other seeds", "--optimizer.lr", "2e-3")
    assert code == 0 and "passes" in said
    code, said = dsv3("--seeds", "5", "--note", "half", "--optimizer.lr", "1e-3", "--json")
    assert code == 1 and "does not pass: slower" in said
    code, said = dsv3("--seeds", "5", "--optimizer.lr", "4e-3")
    assert code == 1 and "make these runs the new ones" in said

    rows = json.loads((here / "recipes/rcp-tiny.json").read_text())["rows"]
    assert [(row["note"], row["check"]["verdict"]) for row in rows] == [
        ("other seeds", "passes"), ("half", "slower")
    ]  # fmt: skip
    mean, half = rows[1]["check"]["paired_percent"]
    assert 80 < mean < 120 and half < 20
    page = (here / "docs/leaderboard.md").read_text()
    assert page.endswith(table(Points.load(rcp.POINTS, rcp.RECIPE)))
    assert "| half (`--optimizer.lr 1e-3`) | 5 |" in page and "| slower |" in page


def test_points_belong_to_what_the_recipe_says(here: Path) -> None:
    assert dsv3("--seeds", "6", "--reference")[0] == 0
    recipe = here / rcp.RECIPE
    recipe.write_text("# a word\n" + recipe.read_text())
    assert Points.load(rcp.POINTS, rcp.RECIPE).reference
    tree = yaml.safe_load(recipe.read_text())
    tree["optimizer"]["beta2"] = 0.9
    before = content(recipe)
    recipe.write_text(yaml.safe_dump(tree))
    assert content(recipe) != before
    assert not Points.load(rcp.POINTS, rcp.RECIPE).reference
    code, said = dsv3("--seeds", "3", "--note", "new")
    assert code == 2 and "use --reference first" in said


def test_what_is_wrong_is_said_before_anything_is_trained(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, least in (((), 3), (("--reference",), 6)):
        code, said = dsv3("--seeds", "2", *words)
        assert code == 2 and f"--seeds (2) must be {least} or more" in said
    assert "optimizer.lrr" in dsv3("--optimizer.lrr", "1")[1]
    assert "takes the recipe as it is" in dsv3("--reference", "--optimizer.lr", "1")[1]
    (here / "data/rcp-tiny/manifest.json").unlink()
    assert "dsv3 data prepare recipes/rcp-data.yaml" in dsv3()[1]
    monkeypatch.chdir(here / "docs")
    assert "run this in the repository's folder" in dsv3()[1]


def test_the_stored_points_are_the_shipped_recipe_s() -> None:
    points = Points.load(rcp.POINTS, rcp.RECIPE)
    assert points.reference, "recipes/rcp-tiny.json is of another recipe: dsv3 bench rcp --reference"
    assert rcp.check(points.reference["steps"], points.reference["steps"]).verdict == "passes"
    assert rcp.PAGE.read_text(encoding="utf-8").endswith(table(points))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_seeds_are_trained_once(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {
        "model": MODEL, "data": {"path": str(prepared)}, "sequence_length": 32, "device": "cpu",
        "total_tokens": 12 * 8 * 32, "batch": {"sequences": 8, "micro_sequences": 8},
        "optimizer": {"lr": 1e-2}, "samples": {"prompts": []},
        "validation": {"every": 1, "sequences": 4, "target": 5.0},
    }  # fmt: skip
    (tmp_path / "recipes").mkdir()
    (tmp_path / rcp.RECIPE).write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    words = ("--seeds", "3", "--workers", "1", "--out", "runs/here", "--json")
    code, said = dsv3(*words)
    assert code == 0
    row = json.loads(said[said.index("{") :])
    assert row["seeds"] == [0, 1, 2] and all(2 < steps < 12 for steps in row["steps"])
    assert all(seconds > 0 for seconds in row["seconds"])
    files = {path: path.stat().st_mtime_ns for path in Path("runs/here").rglob("metrics.jsonl")}
    assert len(files) == 3
    said = dsv3(*words)[1]
    assert json.loads(said[said.index("{") :])["steps"] == row["steps"]
    assert files == {path: path.stat().st_mtime_ns for path in files}
