"""Fine-tuning: parity with transformers on padded batches, resume after a kill, what comes out of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from dsv3.checkpoint.hf import load, save
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.model import ModelConfig
from dsv3.config.sft import SFTRecipe
from dsv3.data.examples import Examples, gather
from dsv3.data.packing import ExampleLoader
from dsv3.data.rows import Row
from dsv3.data.tokenizer import Tokenizer, train
from dsv3.model import DeepSeekV3
from dsv3.ops.cross_entropy import IGNORE
from dsv3.train.objective import LanguageModelling
from dsv3.train.sft import sft
from dsv3.train.trainer import Trainer
from tests.model.transformers_twin import to_twin, twin_of
from tests.parallel.ranks import free_port
from tests.train.conftest import MODEL
from tests.train.test_resume import last_step, same, wait_for

LENGTH = 48
ROWS = [
    {"prompt": f"What is {a} + {b}?", "completion": f"<think>\n{a} + {b} = {a + b}\n</think>\n\n{a + b}"}
    for a in range(6)
    for b in range(a % 3 + 5)
]
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train([json.dumps(ROWS)] * 3, 380)


@pytest.fixture(scope="session")
def start(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model's folder with a tokenizer."""
    words, folder = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("start") / "model"
    tokenizer.save(words)
    save(
        DeepSeekV3(ModelConfig(**MODEL)),
        folder,
        tokenizer_files=[words / "tokenizer.json", words / "tokenizer_config.json"],
    )
    return folder


@pytest.fixture
def make_recipe(start: Path, tmp_path: Path) -> Callable[..., SFTRecipe]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"messages": TALK}]))

    def make(**changes: object) -> SFTRecipe:
        tree = {
            "out": str(tmp_path / "run"), "start": str(start), "device": "cpu", "sequence_length": LENGTH,
            "data": {"train": str(path), "valid_fraction": 0.2},
            "batch": {"sequences": 4, "micro_sequences": 2}, "optimizer": {"lr": 1e-2},
            "checkpoint": {"every": 2, "keep": 2}, "validation": {"every": 3, "sequences": 4},
            "samples": {"every": 100, "prompts": ["What is 1 + 1?"], "tokens": 4},
        }  # fmt: skip
        return recipes.validate(SFTRecipe, {**tree, **changes})

    return make


def talks(tokenizer: Tokenizer) -> Examples:
    return gather([Row(row, "x") for row in [*ROWS[:9], {"messages": TALK}]], tokenizer, LENGTH)


def step(model: DeepSeekV3, loader: ExampleLoader, mtp_weight: float) -> tuple[float, list[float]]:
    """Gradients and losses of one step over all sequences of the loader, micro batches of two."""
    sequences = -(-len(loader) // 2) * 2
    recipe = recipes.validate(
        SFTRecipe,
        {
            "start": None, "model": MODEL, "data": {"train": "x"}, "sequence_length": LENGTH,
            "batch": {"sequences": sequences, "micro_sequences": 2}, "mtp": {"weight": mtp_weight},
        },
    )  # fmt: skip
    objective = LanguageModelling(loader, LENGTH, len(loader) * LENGTH)
    trainer = Trainer(recipe, model, objective, torch.optim.SGD(model.parameters(), 0.0))
    done = objective.accumulate(trainer, sequences)
    return done.loss, done.metrics["mtp_loss"]


def test_a_step_equals_transformers_on_the_padded_batch(tokenizer: Tokenizer) -> None:
    examples = talks(tokenizer)
    model = DeepSeekV3(ModelConfig(**{**MODEL, "aux_loss_alpha": 0.0}), seed=3)
    for layer in model.moe_layers().values():
        torch.nn.init.normal_(layer.gate.e_score_correction_bias, std=0.1)
    twin = twin_of(model)
    loader = ExampleLoader(examples, LENGTH, 2, seed=1, pad_id=tokenizer.pad_id)
    assert len(loader) < len(examples)  # several examples share a sequence
    loss, _ = step(model, loader, mtp_weight=0.0)

    ids = torch.full((len(examples), LENGTH), tokenizer.pad_id)
    labels = torch.full((len(examples), LENGTH), IGNORE)
    for number in range(len(examples)):
        own, bears = (torch.from_numpy(part.copy()) for part in examples.example(number))
        ids[number, : len(own)] = own.long()
        labels[number, : len(own)] = torch.where(bears, own.long(), IGNORE)
    output = twin(input_ids=ids, attention_mask=(labels != IGNORE) | (ids != tokenizer.pad_id), labels=labels)
    output.loss.backward()
    assert loss == pytest.approx(output.loss.item(), abs=1e-4)
    own_gradients = to_twin({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    compared = 0
    for name, parameter in twin.named_parameters():
        if parameter.numel():
            torch.testing.assert_close(own_gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
            compared += float(parameter.grad.abs().max()) > 1e-3
    assert compared > 20  # gradients that are not all tiny
    everything = twin(input_ids=ids, labels=torch.where(ids == tokenizer.pad_id, IGNORE, ids)).loss
    assert abs(everything.item() - loss) > 1e-3  # with loss on questions too it would be another


def test_packing_changes_neither_losses_nor_gradients(tokenizer: Tokenizer) -> None:
    """MTP included: the same step over sequences that hold one example each."""
    examples = talks(tokenizer)
    config = ModelConfig(**{**MODEL, "aux_loss_alpha": 0.0})
    packed, alone = DeepSeekV3(config), DeepSeekV3(config)
    loader = ExampleLoader(examples, LENGTH, 2, pad_id=tokenizer.pad_id)
    found = step(packed, loader, mtp_weight=0.3)
    loader.rows = [row[i : i + 1] for row in loader.rows for i in range(len(row))]
    wanted = step(alone, loader, mtp_weight=0.3)
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    assert found[1] == pytest.approx(wanted[1], abs=1e-5) and found[1][0] > 1
    for (name, one), other in zip(packed.named_parameters(), alone.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_learns_writes_its_folder_and_opens_in_the_engine(make_recipe, start: Path) -> None:
    recipe = make_recipe(epochs=3)
    folder = sft(recipe)
    assert folder == Path(recipe.out)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation_loss" in line]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and steps[-1]["mtp_loss"][0] < steps[0]["mtp_loss"][0]
    assert checks[-1]["validation_loss"] < checks[0]["validation_loss"]
    rates = [line["lr"] for line in steps]
    assert rates[0] == pytest.approx(1e-2) and rates == sorted(rates, reverse=True)
    assert 2e-3 < rates[-1] < 3e-3  # the cosine to a fifth, the report's 5e-6 to 1e-6
    assert {line["gamma"] for line in steps} == {0.0}
    assert {path.name for path in (folder / "plots").iterdir()} >= {"loss.png", "schedules.png"}
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["prompt"] == "What is 1 + 1?" and sample["step"] == steps[-1]["step"]
    log = (folder / "log.txt").read_text()
    assert "examples are held out" in log and "padding" in log

    from dsv3.serve.llm import LLM
    from dsv3.serve.params import SamplingParams

    llm = LLM(folder / "model")
    (answer,) = llm.generate(["What is 1 + 1?"], SamplingParams(max_tokens=4))
    assert answer.token_ids
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "model" / name).read_bytes() == (start / name).read_bytes()


def test_killed_and_resumed_it_ends_bit_equal(make_recipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    unbroken = sft(recipe)
    assert unbroken is not None
    out, path = tmp_path / "killed", tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump({**recipe.model_dump(mode="json"), "out": str(out)}))
    command = [sys.executable, "-m", "dsv3", "sft", str(path)]
    options = dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    process = subprocess.Popen(command, **options)
    wait_for(lambda: last_step(out) >= 3, process)
    process.kill()
    process.communicate()
    again = subprocess.run([*command, "--resume", "auto"], timeout=250, **options)
    assert again.returncode == 0, again.stdout
    assert "resumed from step-00" in again.stdout and f"next: dsv3 chat {out}/model" in again.stdout
    assert same(out / "model", unbroken / "model")


@pytest.mark.slow
def test_two_processes_train_as_one(make_recipe, tmp_path: Path) -> None:
    recipe = make_recipe(epochs=1)
    alone = sft(recipe)
    assert alone is not None
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({**recipe.model_dump(mode="json"), "out": str(tmp_path / "two")}))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(free_port()), "-m", "dsv3", "sft", str(path)),
        ],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (load(folder / "model").state_dict() for folder in (alone, tmp_path / "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    before = load(recipe.start).state_dict()["lm_head.weight"]
    assert (before - one["lm_head.weight"]).abs().max() > 1e-2


def test_other_examples_are_not_resumed_over(make_recipe) -> None:
    recipe = make_recipe()
    sft(recipe)
    path = Path(recipe.data.train[0])
    path.write_text(path.read_text().replace("hi", "ho"))
    with pytest.raises(UserError, match=r"the examples of data\.train are not those the run began with"):
        sft(recipe, "auto")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": "none.jsonl"}}, "none.jsonl does not exist"),
        ({"sequence_length": 4}, r"all 37 rows were dropped: raise sequence_length \(4\)"),
        (
            {"data": {"train": "ROWS", "long": "refuse"}, "sequence_length": 16},
            r"rows.jsonl:1 has \d+ tokens",
        ),
        (
            {"data": {"train": "ROWS", "valid_fraction": 1e-6}},
            r"leaves 37 examples to train on and 0 held out; change it",
        ),
        (
            {"data": {"train": "ROWS", "valid_fraction": 1e-6, "long": "drop"}, "sequence_length": 20},
            r"of 37 rows \(\d+ dropped: too long for sequence_length 20\) leaves .*; change sequence_length",
        ),
        ({"start": None}, "start is required"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    make_recipe, tmp_path: Path, changes: dict, message: str
) -> None:
    if changes.get("data", {}).get("train") == "ROWS":
        changes["data"]["train"] = str(tmp_path / "rows.jsonl")
    if "start" in changes:
        changes = {**changes, "model": MODEL}
    with pytest.raises(UserError, match=message):
        sft(make_recipe(**changes))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_the_chat_format_is_refused(
    make_recipe, tokenizer: Tokenizer, start: Path, tmp_path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(start, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<｜User｜>"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has no special token user"):
        sft(make_recipe(start=str(other)))
