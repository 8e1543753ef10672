"""The reward model: loss and gradients, order, a rule that is learnt, resume after a kill, its use."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dsv3.checkpoint.hf import load, save
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.model import ModelConfig
from dsv3.config.reward import RewardRecipe
from dsv3.data.tokenizer import Tokenizer, train
from dsv3.evaluate.preferences import Pair, encode_pairs, is_held_out, read_rows
from dsv3.evaluate.reward_model import BATCH, RewardModel, pair_accuracy, score_tokens
from dsv3.evaluate.rewards import Rewards
from dsv3.model import DeepSeekV3
from dsv3.model.score import add_score, scores
from dsv3.train.optimizer import build
from dsv3.train.reward import BradleyTerry, preference_loss, reward
from dsv3.train.run import read_lines
from dsv3.train.trainer import Trainer
from tests.model.build import ids, tiny_model
from tests.train.conftest import MODEL
from tests.train.test_resume import last_step, same, wait_for

WORDS = ["red", "green", "blue", "one", "two", "three", "up", "down", "left", "right"]


def rows() -> list[dict[str, str]]:
    """The better answer says yes, whatever else it says."""
    draw = random.Random(0)
    found = []
    for number in range(120):
        said = [" ".join(draw.choices(WORDS, k=draw.randint(2, 5))) for _ in range(2)]
        found.append(
            {
                "prompt": f"{number} {draw.choice(WORDS)}?",
                "chosen": f"{said[0]} yes",
                "rejected": f"{said[1]} no",
            }
        )
    return found


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train([json.dumps(rows())] * 3, 380)


@pytest.fixture(scope="session")
def start(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model's folder with a tokenizer."""
    words, folder = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("start") / "model"
    tokenizer.save(words)
    files = [words / "tokenizer.json", words / "tokenizer_config.json"]
    save(DeepSeekV3(ModelConfig(**MODEL)), folder, tokenizer_files=files)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def tree_of(start: Path, pairs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "out": str(out), "start": str(start), "device": "cpu", "sequence_length": 60,
        "data": {"train": [str(pairs)], "held_out": 0.2}, "batch": {"sequences": 16, "micro_sequences": 8},
        "optimizer": {"lr": 1e-2}, "checkpoint": {"every": 3, "keep": 2}, "validation": {"every": 9},
        **changes,
    }  # fmt: skip


@pytest.fixture
def make(start: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., RewardRecipe]:
    def made(**changes: Any) -> RewardRecipe:
        return recipes.validate(RewardRecipe, tree_of(start, pairs_file, tmp_path / "run", **changes))

    return made


def random_pairs(count: int) -> list[Pair]:
    draw = random.Random(1)
    return [
        Pair(*([draw.randrange(60) for _ in range(draw.randint(3, 9))] for _ in range(2)), str(number))
        for number in range(count)
    ]


def test_the_loss_is_bradley_and_terrys_and_its_gradient_too() -> None:
    model, pairs = add_score(tiny_model(num_nextn_predict_layers=1)), random_pairs(5)
    loss, margins, _ = preference_loss(model, pairs, 60)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = torch.zeros((), dtype=torch.float64)
    for pair in pairs:  # one conversation at a time, without padding
        good, bad = (
            scores(model, torch.tensor([tokens]), torch.tensor([len(tokens) - 1]))[0][0].double()
            for tokens in (pair.chosen, pair.rejected)
        )
        wanted = wanted - torch.log(1 / (1 + torch.exp(bad - good)))
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(found)
    assert "score.weight" in found and "lm_head.weight" not in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5, msg=name)
    assert len(margins) == 5


@pytest.mark.parametrize("micro", [1, 3, 6])
def test_micro_batches_add_up(make: Callable[..., RewardRecipe], micro: int) -> None:
    recipe = make(batch={"sequences": 6, "micro_sequences": micro})
    model = add_score(tiny_model())
    objective = BradleyTerry(random_pairs(8), 1, 0, 60)
    trainer = Trainer(recipe, model, objective, build(model, recipe.optimizer))
    done = objective.accumulate(trainer, 6)
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, margins, _ = preference_loss(model, objective.take(0, 6), 60)
    (loss / 6).backward()
    assert done.loss == pytest.approx(float(loss.detach()) / 6, rel=1e-4)
    assert done.metrics["accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert done.tokens == sum(len(p.chosen) + len(p.rejected) for p in objective.take(0, 6))
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def test_every_epoch_sees_every_pair_once_in_an_order_of_its_own() -> None:
    pairs = random_pairs(37)
    objective = BradleyTerry(pairs, 3, 5, 60)
    seen = [pair.group for first in range(0, 120, 8) for pair in objective.take(first, 8)]
    assert len(seen) == 111
    epochs = [seen[at : at + 37] for at in (0, 37, 74)]
    assert all(sorted(epoch) == sorted(pair.group for pair in pairs) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = BradleyTerry(pairs, 3, 6, 60)
    assert [pair.group for pair in again.take(0, 37)] != epochs[0]


def test_scores_do_not_depend_on_company() -> None:
    model = add_score(tiny_model()).eval()
    texts = [ids(1, 3 + number % 9, seed=number)[0].tolist() for number in range(2 * BATCH + 3)]
    together = score_tokens(model, texts, 60)
    alone = [score_tokens(model, [text], 60)[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_rule_is_learnt_and_the_model_is_a_reward_function(
    make: Callable[..., RewardRecipe], tokenizer: Tokenizer, pairs_file: Path, tmp_path: Path
) -> None:
    out = reward(make(epochs=6, checkpoint={"every": 99}))
    assert out is not None
    checks = [line for line in read_lines(out / "metrics.jsonl") if "held_out_accuracy" in line]
    assert checks[0]["step"] == 0 and checks[0]["held_out_loss"] == pytest.approx(0.693, abs=0.15)
    assert checks[-1]["held_out_accuracy"] > 0.9 > 0.75 > checks[0]["held_out_accuracy"]
    assert checks[-1]["held_out_standard_error"] < 0.1
    steps = [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]
    assert steps[-1]["margin"] > 1 and 0 <= steps[-1]["accuracy"] <= 1
    assert (out / "plots/accuracy.png").stat().st_size > 1000

    judge = RewardModel(out / "model")
    pairs = encode_pairs(tokenizer, read_rows([str(pairs_file)]), 60)
    held_out = [pair for pair in pairs if is_held_out(pair.group, 0.2)]
    found, loss = pair_accuracy(judge.model, held_out, tokenizer.pad_id)
    assert found.value == checks[-1]["held_out_accuracy"]
    assert loss == pytest.approx(checks[-1]["held_out_loss"], abs=1e-5)
    row = rows()[0]
    values = Rewards([judge])(
        [row["prompt"], [{"role": "user", "content": row["prompt"]}], "x"],
        [row["chosen"], [{"role": "assistant", "content": row["rejected"]}], "long " * 99],
        id=["a", "b", "c"],
    )
    good, bad, long = values.by_function["reward_model"]
    assert good is not None and bad is not None and good > bad and long is None
    with pytest.raises(UserError, match="no scalar head"):
        RewardModel(load(make().start or ""), tokenizer)


@pytest.mark.slow
def test_kill_nine_then_resume_is_bit_equal(start: Path, pairs_file: Path, tmp_path: Path) -> None:
    unbroken = reward(recipes.validate(RewardRecipe, tree_of(start, pairs_file, tmp_path / "one", epochs=2)))
    assert unbroken is not None
    out, path = tmp_path / "two", tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(tree_of(start, pairs_file, out, epochs=2)))
    command = [sys.executable, "-m", "dsv3", "reward", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    wait_for(lambda: last_step(out) >= 4, process)
    process.kill()
    process.communicate()
    assert not (out / "model").exists(), "it was over before the signal came"
    again = subprocess.run(
        [*command, "--resume", "auto"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert "resumed from step-" in again.stderr and f"function: model:{out}/model" in again.stdout
    assert same(out / "model", unbroken / "model")
    lines, wanted = (
        [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
        for run in (out, unbroken)
    )
    assert lines == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"train": ["nowhere.jsonl"]}}, "nowhere.jsonl does not exist"),
        ({"sequence_length": 4}, r"sequence_length \(4\), leaves 0 to train on"),
        ({"data": {"train": ["PAIRS"], "held_out": 1e-9}}, "0 held out"),
        ({"start": None}, "start is required"),
        ({"schedule": {"measure": "tokens"}}, "tokens of a reward run are not known"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    start: Path, pairs_file: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    tree = json.loads(json.dumps(changes).replace("PAIRS", str(pairs_file)))
    if "start" in changes:
        tree["model"] = MODEL
    with pytest.raises(UserError, match=words):
        reward(recipes.validate(RewardRecipe, {**tree_of(start, pairs_file, tmp_path / "run"), **tree}))
    assert not (tmp_path / "run").exists()
