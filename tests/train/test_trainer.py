"""The loop: it learns, skips what is not finite, stops on a signal, writes what it should."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import dsv3
from dsv3.common.errors import UserError
from dsv3.config.train import PretrainRecipe
from dsv3.data.loader import TokenLoader
from dsv3.data.shards import open_split
from dsv3.train.objective import LanguageModelling
from dsv3.train.optimizer import build
from dsv3.train.pretrain import pretrain
from dsv3.train.run import read_lines
from dsv3.train.stage import make_model
from dsv3.train.trainer import Callback, StepReport, Trainer, TrainingFailed


def trainer_of(recipe: PretrainRecipe, *callbacks: Callback) -> Trainer:
    model = make_model(recipe, torch.device("cpu"))
    sources = [(shards, weight) for _, shards, weight in open_split(recipe.data.path, "train")]
    loader = TokenLoader(sources, recipe.sequence_length, 2, recipe.seed)
    objective = LanguageModelling(loader, recipe.sequence_length, recipe.total_tokens)
    return Trainer(recipe, model, objective, build(model, recipe.optimizer), callbacks)


class Spoil(Callback):
    """Puts NaN into a gradient at the given steps."""

    def __init__(self, *steps: int):
        self.steps = steps
        self.reports: list[StepReport] = []

    def on_start(self, trainer: Trainer) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("nan") if trainer.state.step in self.steps else gradient

        trainer.model.lm_head.weight.register_hook(spoil)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        self.reports.append(report)


def test_it_learns(make_recipe) -> None:
    trainer = trainer_of(make_recipe(total_tokens=30 * 8 * 32), watch := Spoil())
    trainer.train()
    losses = [report.metrics["loss"] for report in watch.reports]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(5.95, abs=0.2)  # ln 384: nothing is known yet
    assert sum(losses[-3:]) / 3 < 3.6
    assert watch.reports[-1].metrics["mtp_loss"][0] < 4.5
    assert all(sum(load) == 8 * 32 * 2 for load in watch.reports[0].loads.values())


def test_a_step_that_is_not_finite_changes_nothing(make_recipe) -> None:
    trainer = trainer_of(make_recipe(), spoil := Spoil(2))
    states = []

    class Keep(Callback):
        def on_step(self, trainer: Trainer, report: StepReport) -> None:
            states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})

    trainer.callbacks = (spoil, Keep())
    trainer.train()
    assert [report.metrics["skipped"] for report in spoil.reports[:5]] == [0, 0, 1, 1, 1]
    assert all(torch.equal(states[2][k], states[1][k]) for k in states[1])  # biases too
    assert not torch.equal(states[3]["lm_head.weight"], states[2]["lm_head.weight"])


def test_too_many_in_a_row_end_the_run(make_recipe) -> None:
    trainer = trainer_of(make_recipe(max_skipped=3), Spoil(1, 3, 4, 5, 6))
    with pytest.raises(TrainingFailed, match=r"3 steps in a row, the last of them 6: .*--optimizer\.lr"):
        trainer.train()
    assert trainer.state.skipped == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(make_recipe, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    class Kill(Callback):
        def on_step(self, trainer: Trainer, report: StepReport) -> None:
            if trainer.state.step == 3:
                os.kill(os.getpid(), number)

    trainer = trainer_of(make_recipe(), Kill())
    trainer.train()
    assert (trainer.state.step, trainer.stopping, trainer.finished) == (3, number.name, False)
    assert signal.getsignal(number) is before


def test_the_run_folder(make_recipe) -> None:
    recipe = make_recipe(ema={"decay": 0.5}, samples={"every": 5})
    folder = pretrain(recipe)
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["tokens"] == recipe.total_tokens
    wanted = {"mtp_loss", "balance_loss", "grad_norm", "lr", "batch_sequences", "tokens_per_second"}
    assert wanted | {"max_violation", "expert_load", "memory_bytes"} <= set(steps[0])
    assert set(steps[0]["expert_load"]) == {"1", "2", "3"}
    checks = [line for line in lines if "validation_bits_per_byte" in line]
    assert [line["step"] for line in checks] == [6, 12]
    assert checks[1]["validation_bits_per_byte"] < checks[0]["validation_bits_per_byte"]
    assert 0 <= checks[1]["mtp_acceptance"][0] <= 1
    plots = ["expert_load.png", "loss.png", "max_violation.png", "schedules.png"]
    assert sorted(p.name for p in (folder / "plots").glob("*.png")) == plots
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (folder / "plots").glob("*.png"))
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step-000004", "step-000008", "step-000012",
    ]  # fmt: skip
    assert {json.loads(line)["step"] for line in (folder / "samples.jsonl").open()} == {5, 10, 12}
    model = dsv3.load(folder / "model")
    assert model.config == recipe.model.model_copy(update={"extra": model.config.extra})
    average = dsv3.load(folder / "model-ema")
    assert not torch.equal(average.lm_head.weight, model.lm_head.weight)
    assert torch.allclose(average.lm_head.weight, model.lm_head.weight, atol=0.05)
    with pytest.raises(UserError, match="already holds a run: go on with --resume auto"):
        pretrain(recipe)


def test_the_biases_move_once_a_step_by_the_load_of_the_whole_batch(make_recipe) -> None:
    trainer = trainer_of(make_recipe(balance={"gamma": 0.01}, batch={"sequences": 8, "micro_sequences": 2}))
    for layer, load in trainer.step().loads.items():
        load = torch.tensor(load, dtype=torch.float32)
        bias = trainer.model.moe_layers()[layer].gate.e_score_correction_bias
        torch.testing.assert_close(bias, 0.01 * (load.mean() - load).sign())


def test_ema_is_the_average_of_the_weights(make_recipe) -> None:
    from dsv3.train.callbacks.ema import EMA

    class SlowEMA(EMA):
        def _update(self, weights: dict[str, torch.Tensor]) -> None:
            time.sleep(0.05)  # longer than a step: the optimizer has to wait for it
            super()._update(weights)

    ema = SlowEMA(0.75)
    seen: list[torch.Tensor] = []

    class Keep(Callback):
        def on_start(self, trainer: Trainer) -> None:
            seen.append(trainer.model.lm_head.weight.detach().clone())

        def on_step(self, trainer: Trainer, report: StepReport) -> None:
            seen.append(trainer.model.lm_head.weight.detach().clone())

    trainer = trainer_of(make_recipe(), ema, Keep())
    trainer.train()
    average = seen[0]
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    torch.testing.assert_close(ema.average["lm_head.weight"], average)


def test_spikes_and_skips_are_logged(make_recipe, tmp_path: Path) -> None:
    from dsv3.train.callbacks.watch import Watch
    from dsv3.train.run import RunFolder

    run = RunFolder(tmp_path)
    watch = Watch(run)
    trainer = trainer_of(make_recipe())
    watch.on_start(trainer)
    for step in range(1, 80):
        trainer.state.step = step
        loss = 9.0 if step == 70 else 3.0 + 0.02 * (step % 3)
        if step == 75:
            trainer.state.skipped, loss = 1, float("nan")
        watch.on_step(trainer, StepReport({"loss": loss, "grad_norm": 1.0}, {}, 0.1))
    log = (tmp_path / "log.txt").read_text()
    assert "step 70: loss spike, 9.000 after 3.0" in log
    assert "step 75 skipped: loss nan" in log
    assert log.count("\n") == 2


def test_bf16_trains_on_fp32_master_weights(make_recipe) -> None:
    trainer = trainer_of(make_recipe(precision="bf16", total_tokens=20 * 8 * 32), watch := Spoil())
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.model(torch.tensor([[5, 6]])).hidden_BTD.dtype == torch.bfloat16
    assert watch.reports[-1].metrics["loss"] < 4.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"path": "/nowhere"}}, "holds no prepared data.*dsv3 data prepare"),
        ({"device": "tpu9"}, "device .tpu9. is unknown"),
        ({"model": {"vocab_size": 256}}, "model.vocab_size .256. is below the tokenizer's 350 .*384"),
    ],
)
def test_refusals_come_before_anything_is_written(make_recipe, changes: dict, words: str) -> None:
    recipe = make_recipe(**changes)
    with pytest.raises(UserError, match=words):
        pretrain(recipe)
    assert not Path(recipe.out).exists()
