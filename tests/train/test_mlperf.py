"""A run ends at its target, over the data it names, and its log passes MLPerf's own compliance checker."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.sft import SFTRecipe
from dsv3.config.train import PretrainRecipe
from dsv3.data.loader import Batch
from dsv3.evaluate.held_out import HeldOut
from dsv3.train.callbacks.mlperf import MARK, NAME, MLPerf
from dsv3.train.callbacks.validation import Validation
from dsv3.train.pretrain import pretrain
from dsv3.train.run import RunFolder, read_lines
from dsv3.train.schedules import Extent, Schedules
from dsv3.train.trainer import Progressed

RECIPE = "recipes/mlperf-v3-671b.yaml"
STEP = 8 * 32  # tokens
SIZES = {"global_batch_size", "max_sequence_length", "eval_samples"}  # all that MLPerf has against a tiny run


def readings(run: Path) -> dict[int, float]:
    lines = read_lines(run / "metrics.jsonl")
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def entries(path: Path) -> list[dict]:
    return [json.loads(line.removeprefix(MARK)) for line in path.read_text().splitlines()]


def complaints(path: Path, ruleset: str = "6.0.0") -> dict[str | None, str]:
    """What MLPerf's checker has against a log, by key; None: what is about no single line."""
    checker_of = pytest.importorskip("mlperf_logging.compliance_checker.mlp_compliance")
    checker = checker_of.make_checker("training", ruleset, quiet=False, werror=True)
    checker.check_file(str(path), f"training_{ruleset}/common.yaml")
    return {**checker.overwritable, **dict.fromkeys([None] * bool(checker.not_overwritable), "")}


def test_a_run_ends_where_it_reaches_its_target(
    make_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlperf_logging")
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # some library silences everybody
    recipe = make_recipe(
        validation={"every": 2, "sequences": 4},
        log={"report_to": "mlperf"},
        mlperf={"benchmark": "deepseekv3_671b"},
        schedule={"learning_rate": [{"until": 4 / 12, "to": 1, "shape": "linear"}, {"until": 1, "to": 1}]},
    )
    whole = pretrain(recipe)
    assert whole is not None
    curve = readings(whole)
    assert list(curve) == [2, 4, 6, 8, 10, 12]
    log = entries(whole / NAME)
    values = {entry["key"]: entry["value"] for entry in log}
    assert set(complaints(whole / NAME)) == SIZES
    assert values["max_steps"] == 12 and values["opt_learning_rate_warmup_steps"] == 4
    assert values["opt_learning_rate_decay_schedule"] == "constant with linear warmup"
    read = [entry for entry in log if entry["key"] == "eval_accuracy"]
    assert {e["metadata"]["step"]: e["value"] for e in read} == curve
    assert [e["metadata"]["samples_count"] for e in read] == [8 * step for step in curve]
    assert log[-1]["key"] == "run_stop" and log[-1]["metadata"]["status"] == "success"
    times = [entry["time_ms"] for entry in log]
    assert times == sorted(times)

    # The same run with a target between two readings ends at the second, and once ended goes no further.
    target = (curve[4] + curve[6]) / 2
    early = recipe.model_copy(
        update={
            "out": str(tmp_path / "early"),
            "validation": recipe.validation.model_copy(update={"target": target}),
        }
    )
    for resume_from in (None, "auto"):
        short = pretrain(early, resume_from)
        assert short is not None and (short / "model").is_dir()
        assert {step: curve[step] for step in (2, 4, 6)} == readings(short)
    ends = [entry["metadata"] for entry in entries(short / NAME) if entry["key"] == "run_stop"]
    assert [(end["status"], end["step"]) for end in ends] == [("success", 6)]

    # Gone on with from a checkpoint before its end: what came after is not there twice.
    longer = early.model_copy(update={"validation": early.validation.model_copy(update={"target": 0.1})})
    pretrain(longer, str(short / "checkpoints" / "step-000004"))
    again = entries(short / NAME)
    for key in ("run_start", "run_stop", "seed"):
        assert [entry["key"] for entry in again].count(key) == 1
    assert {e["metadata"]["step"]: e["value"] for e in again if e["key"] == "eval_accuracy"} == curve
    assert again[-1]["metadata"]["status"] == "aborted"  # at the end of the tokens, above the target
    assert set(complaints(short / NAME)) == SIZES
    assert "has not come down to the target 0.1" in (short / "log.txt").read_text()


def drive(recipe: PretrainRecipe, folder: Path, losses: list[float]) -> Path:
    """The log of a run of this recipe that reads these losses step by step, without the training."""
    log = MLPerf(folder, samples=1_574_207_408)
    rows = Batch(torch.zeros(recipe.validation.sequences, 2))
    validation = Validation(RunFolder(folder), rows, torch.ones(1), recipe.validation)
    extent = Extent("tokens", recipe.total_tokens, recipe.sequence_length)
    trainer = SimpleNamespace(
        recipe=recipe, schedules=Schedules(recipe, extent), state=Progressed(), callbacks=[validation, log],
        world=SimpleNamespace(data_size=128), finished=False,
    )  # fmt: skip
    log.on_start(trainer)
    for step, loss in enumerate(losses, start=1):
        trainer.state = Progressed(step=step, samples=step * recipe.batch.sequences)
        validation.last, validation.last_step = HeldOut(loss, 1.0, []), step
        trainer.finished = trainer.state.reached = loss <= recipe.validation.target
        log.on_step(trainer, None)
    log.on_end(trainer)
    return log.path


@pytest.mark.parametrize("division", ["closed", "open"])
def test_the_671b_recipe_passes_mlperf_s_own_rules(division: str, tmp_path: Path) -> None:
    pytest.importorskip("mlperf_logging")
    recipe = recipes.load(PretrainRecipe, RECIPE, ["--mlperf.division", division])
    path = drive(recipe, tmp_path, [3.7, 3.65, 3.6])
    assert complaints(path) == {}
    assert entries(path)[-1]["metadata"] == {
        **entries(path)[-1]["metadata"], "samples_count": 3 * 15360, "status": "success",
    }  # fmt: skip
    # The checker does look: another learning rate, and a loss that stays above the target.
    other = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": 2.4e-5})})
    if division == "closed":
        assert "opt_base_learning_rate" in complaints(drive(other, tmp_path, [3.6]))
    assert None in complaints(drive(recipe, tmp_path, [3.7, 3.61]))


def planned(*words: str) -> dict:
    from dsv3.cli.main import app

    done = CliRunner().invoke(app, ["plan", *words, "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_the_planner_prices_the_671b_recipe() -> None:
    found = planned("cost", RECIPE, "--tokens", "3.02e9")  # 48 steps
    assert found["tokens"] == 3.02e9 and 512 < found["gpu_hours"] < 2000  # MLPerf's budget was for GB300s


@pytest.mark.slow
def test_the_planner_lays_the_671b_recipe_out() -> None:
    found = planned("layout", RECIPE, "--hardware", "h200")
    assert found["holds"] and found["micro_batches"] == 120


def test_other_data_than_the_recipe_s_is_refused_before_anything_is_written(
    make_recipe, prepared: Path
) -> None:
    tokenizer = hashlib.sha256((prepared / "tokenizer.json").read_bytes()).hexdigest()
    tokens = hashlib.sha256()
    for split in ("train", "valid"):
        for path in sorted((prepared / split).glob("*/*.bin")):
            tokens.update(path.read_bytes())
    right = {"path": str(prepared), "tokenizer_sha256": tokenizer, "tokens_sha256": tokens.hexdigest()}
    for key in ("tokenizer_sha256", "tokens_sha256"):
        recipe = make_recipe(data={**right, key: "0" * 64})
        with pytest.raises(UserError, match=f"data.{key}: .* the recipe asks for 000000000000"):
            pretrain(recipe)
        assert not Path(recipe.out).exists()
    assert pretrain(make_recipe(data=right, total_tokens=STEP)) is not None


def test_only_pre_training_writes_mlperf_s_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log.report_to \(mlperf\) is for pre-training, not for sft"):
        recipes.validate(
            SFTRecipe,
            {"start": None, "model": {"preset": "tiny"}, "data": {"train": ["x.jsonl"]},
             "log": {"report_to": "mlperf"}},
        )  # fmt: skip


def test_a_missing_library_is_said_before_anything_is_written(
    make_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_logging.mllog.mllog", None)
    recipe = make_recipe(log={"report_to": "mlperf"})
    with pytest.raises(UserError, match=r"log.report_to \(mlperf\) is not installed: pip install"):
        pretrain(recipe)
    assert not Path(recipe.out).exists()
