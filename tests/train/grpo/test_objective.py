"""A run on a toy: it learns, tells what TRL tells, and says which sample a reward function failed on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from dsv3.checkpoint.hf import tokenizer_files
from dsv3.common.errors import Failure, UserError
from dsv3.config.grpo import GRPORecipe
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluate.judge import Judge
from dsv3.model.score import add_score
from dsv3.train.grpo.completions import Completions
from dsv3.train.grpo.objective import GRPO
from dsv3.train.grpo.prompts import Prompts
from dsv3.train.grpo.rewards import resolve
from dsv3.train.grpo.rollouts import Rollouts
from dsv3.train.grpo.run import grpo
from dsv3.train.optimizer import build
from dsv3.train.run import RunFolder, read_lines
from dsv3.train.stage import make_model
from dsv3.train.trainer import Trainer

Make = Callable[..., GRPORecipe]


def trainer_of(recipe: GRPORecipe, tokenizer: Tokenizer) -> Trainer:
    """A trainer without the files and callbacks of a stage."""
    run = RunFolder(recipe.out)
    run.begin(recipe, resume=False)
    model = make_model(recipe, torch.device("cpu"))
    options = recipe.rollouts
    rollouts = Rollouts(
        model,
        tokenizer,
        recipe.sequence_length,
        options.max_batch,
        options.draft_tokens,
        options.replay_routing,
    )
    reference = make_model(recipe, torch.device("cpu")) if recipe.policy.beta else None
    prompts = Prompts(recipe, tokenizer, recipe.sequence_length - options.max_tokens)
    objective = GRPO(
        recipe,
        rollouts,
        prompts,
        resolve(recipe, torch.device("cpu")),
        Completions(run, recipe.shown),
        reference,
    )
    optimizer = build(model, recipe.optimizer, recipe.precision)
    return Trainer(recipe, model, objective, optimizer, [objective])


@pytest.mark.parametrize(("preset", "steps"), [("v3", 20), ("gspo", 32)])
def test_it_learns(make: Make, tokenizer: Tokenizer, preset: str, steps: int) -> None:
    policy: dict[str, Any] = {"preset": preset, "beta": 0.001 if preset == "v3" else 0.0}
    if preset == "gspo":  # its clip lets hardly anything pass a second time
        policy |= {"epsilon_low": 0.1, "epsilon_high": 0.1}
    recipe = make(
        policy=policy, steps=steps, shown={"rows": 0},
        rollouts={"answers": 8, "minibatches": 2 if preset == "gspo" else 1, "draft_tokens": 1},
        batch={"sequences": 32, "micro_sequences": 16},
    )  # fmt: skip
    trainer = trainer_of(recipe, tokenizer)
    told = [trainer.step().metrics for _ in range(recipe.steps)]
    rewards = [line["reward"] for line in told if "reward" in line]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
    assert told[0]["sampling/sampling_logp_difference/mean"] < 1e-5


@pytest.mark.parametrize("replay", [False, True])
def test_what_a_run_writes(make: Make, replay: bool, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make(
        tasks=[{"name": "sums", "weight": 2}], rewards=[
            {"function": "task"}, {"function": make().rewards[0].function, "weight": 0.5},
            {"function": make().rewards[0].function.replace("spaces", "compute_score"), "style": "verl"},
        ],
        rollouts={"minibatches": 2, "epochs": 2, "replay_routing": replay}, policy={"preset": "deepseekmath"},
        evaluation={"every": 2, "examples": 3}, shown={"every": 1, "rows": 2}, steps=5,
    )  # fmt: skip
    out = grpo(recipe)
    assert out is not None
    assert re.search(r"100%.* loss -?\d.*  reward \d\.\d{3}  lr", capsys.readouterr().err)
    lines = read_lines(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    fresh = {
        "reward", "reward_std", "frac_reward_zero_std", "rewards/task/mean", "rewards/spaces/std",
        "rewards/compute_score/mean", "completions/mean_length", "completions/min_length",
        "completions/max_length", "completions/mean_terminated_length", "completions/clipped_ratio", "seen",
        "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "draft_acceptance",
    }  # fmt: skip
    always = {
        "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean",
        "clip_ratio/high_max", "clip_ratio/region_mean", "num_tokens", "step_time", "lr", "grad_norm",
    }  # fmt: skip
    for number, line in enumerate(steps):
        assert always <= set(line)
        assert (fresh <= set(line)) == (number % 4 == 0), number  # four steps a batch of rollouts
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[3]["kl"] > 1e-5
    assert steps[0]["seen"] == 32
    assert any("accuracy/sums-1" in line for line in lines)
    assert sorted(line["step"] for line in lines if "accuracy/sums-1" in line) == [0, 2, 4, 5]
    samples = [json.loads(text) for text in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [1] * 32 + [5] * 32
    assert set(samples[0]["rewards"]) == {"task", "spaces", "compute_score"}
    assert {line["rewards"]["task"] is None for line in samples} == {True, False}  # rows of the file, of sums
    assert all(line["extra"]["ids"] == line["tokens"] for line in samples)
    assert "completion" in (out / "log.txt").read_text()
    assert {path.name for path in (out / "plots").iterdir()} >= {"reward.png", "policy.png"}
    assert (out / "model/model.safetensors").exists() and (out / "model/tokenizer.json").exists()


def test_no_reward_at_all_teaches_nothing(make: Make, tokenizer: Tokenizer, rewards_file: Path) -> None:
    recipe = make(rewards=[{"function": f"{rewards_file}:some"}], policy={"preset": "dr_grpo"})
    trainer = trainer_of(recipe, tokenizer)
    before = trainer.model.lm_head.weight.clone()
    metrics = trainer.step().metrics
    assert metrics["reward"] == 1.0 and metrics["frac_reward_zero_std"] == 1.0
    assert metrics["grad_norm"] == 0 and torch.equal(trainer.model.lm_head.weight, before)


def test_answers_that_nobody_judges_are_told_of_once(make: Make, rewards_file: Path) -> None:
    path = rewards_file.with_name("never.py")
    path.write_text("def never(prompts, **columns):\n    return [None] * len(prompts)\n")
    rewards, rollouts = [{"function": f"{path}:never"}], {"minibatches": 2}  # four steps, two batches
    out = grpo(make(rewards=rewards, rollouts=rollouts, policy={"beta": 0.0}))
    assert out is not None
    log = (out / "log.txt").read_text()
    assert log.count("no reward function gave any answer a number") == 1 and "step 1: no reward" in log


def test_beta_zero_holds_no_reference(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import dsv3.train.grpo.run as module

    made = []
    monkeypatch.setattr(module, "make_model", lambda *a: made.append(make_model(*a)) or made[-1])
    grpo(make(policy={"preset": "dapo"}, steps=1))
    assert len(made) == 1


def test_groups_without_signal_are_drawn_anew(make: Make, tokenizer: Tokenizer, rewards_file: Path) -> None:
    rewards_file.with_name("rare.py").write_text(
        "def rare(prompts, completions, id, completion_ids, **columns):\n"
        "    return [float(name == 'c' and ids[0] % 2) for name, ids in zip(id, completion_ids)]\n"
    )
    rare = [{"function": f"{rewards_file.with_name('rare.py')}:rare"}]
    drawn, zero = {}, {}
    for redraw in (0, 4):
        recipe = make(rewards=rare, policy={"preset": "dapo", "redraw": redraw}, out=f"{make().out}-{redraw}")
        trainer = trainer_of(recipe, tokenizer)
        metrics = trainer.step().metrics
        drawn[redraw], zero[redraw] = metrics["prompts_drawn"], metrics["reward_std"]
        assert trainer.objective.serial == drawn[redraw]  # type: ignore[attr-defined]
    assert drawn[0] == 4 < drawn[4] and zero[4] > zero[0]


@pytest.mark.parametrize("on_crash", ["stop", "skip"])
def test_a_crash_in_a_reward_names_the_sample(
    make: Make, rewards_file: Path, on_crash: str, capfd: pytest.CaptureFixture
) -> None:
    recipe = make(
        rewards=[{"function": f"{rewards_file}:crashes"}, {"function": f"{rewards_file}:spaces"}],
        on_crash=on_crash, steps=1, policy={"beta": 0.0},
    )  # fmt: skip
    if on_crash == "stop":
        with pytest.raises(Failure, match=r"crashes failed on sample b .*KeyError.*mine.py, line"):
            grpo(recipe)
        return
    out = grpo(recipe)
    assert out is not None
    assert "crashes failed on sample b" in capfd.readouterr().err
    samples = [json.loads(text) for text in (out / "samples.jsonl").read_text().splitlines()]
    assert {line["rewards"]["crashes"] for line in samples} == {None, 0.5}


def test_models_are_rewards_too(make: Make, start: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "rm"
    dsv3.save(add_score(dsv3.load(start)), folder, tokenizer_files=tokenizer_files(start))
    rewards = [{"function": f"model:{folder}"}, {"function": "format", "weight": 0.1}]
    trainer = trainer_of(make(rewards=rewards, steps=1, tasks=[{"name": "sums"}]), tokenizer)
    metrics = trainer.step().metrics
    assert metrics["rewards/reward_model/std"] > 0
    judge = resolve(make(rewards=[{"function": f"judge:{start}"}]), torch.device("cpu")).functions
    assert isinstance(judge["judge"], Judge)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rewards": [{"function": "tasks"}]}, r"rewards.function \(tasks\) is unknown \(did you mean task\?\)"),
    ({"rewards": [{"function": "nowhere.py:f"}]}, "nowhere.py does not exist"),
    ({"rewards": [{"function": "task"}, {"function": "task"}]}, "rewards name task twice"),
    ({"rewards": [{"function": "task"}]}, r"rewards.function \(task\): no prompt belongs to a task"),
    ({"rewards": [{"function": "model:nowhere"}]}, "nowhere folder does not exist"),
    ({"prompts": {"paths": ["nowhere.jsonl"]}}, "nowhere.jsonl does not exist"),
    ({"sequence_length": 15}, r"prompts.jsonl:2: the prompt has \d+ tokens"),
    ({"tasks": [{"name": "sum"}]}, r"task \(sum\) is unknown \(did you mean sums\?\)"),
]
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"batch": {"sequences": 18, "micro_sequences": 6}},
        r"batch.sequences \(18\) must be a multiple of roll",
    ),
    ({"rollouts": {"max_tokens": 48}}, r"rollouts.max_tokens \(48\) must be below sequence_length \(48\)"),
    ({"model": {"num_nextn_predict_layers": 0}}, r"rollouts.draft_tokens \(1\) needs an MTP module"),
    ({"rollouts": {"replay_routing": True}, "compile": True}, "replay_routing and compile exclude"),
    ({"prompts": {"paths": []}}, "tasks and prompts.paths are empty"),
    ({"rewards": []}, "rewards is empty"),
    ({"balance": {"gamma": 0.001}}, r"balance.gamma \(0.001\) must be 0"),
    ({"mtp": {"weight": 0.3}}, r"mtp.weight \(0.3\) must be 0"),
    ({"policy": {"preset": "dpo"}}, r"policy.preset \(dpo\) is unknown.*there are v3, deepseekmath"),
    ({"rollouts": {"answers": 1}}, "rollouts.answers"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_mistakes_are_refused_before_anything_is_written(make: Make, changes: dict, words: str) -> None:
    recipe = make(**changes)
    with pytest.raises(UserError, match=words) as caught:
        grpo(recipe)
    assert caught.value.exit_code == 2
    assert not Path(recipe.out).exists()


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_recipes_that_make_no_sense_are_refused(make: Make, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(**changes)


def test_a_preset_is_a_start_and_other_keys_change_it(make: Make) -> None:
    policy = make(policy={"preset": "dapo", "epsilon_low": 0.1}).policy
    assert (policy.average, policy.epsilon_low, policy.epsilon_high, policy.redraw) == ("token", 0.1, 0.28, 3)
    assert make().policy == make(policy={"preset": "v3"}).policy


def test_prompts_are_a_function_of_their_number(make: Make, tokenizer: Tokenizer) -> None:
    recipe = make(tasks=[{"name": "sums"}, {"name": "sorting", "weight": 2}], system="Be brief.")
    prompts, again = Prompts(recipe, tokenizer, 200), Prompts(recipe, tokenizer, 200)
    drawn = [prompts(number) for number in range(4000)]
    assert [again(number).ids for number in (7, 3999, 3)] == [drawn[number].ids for number in (7, 3999, 3)]
    kinds = [prompt.columns.get("task") for prompt in drawn]
    assert [kinds.count(kind) / 1000 for kind in ("sums", "sorting", None)] == [1, 2, 1]
    rows = [prompt.columns["id"] for prompt in drawn if "task" not in prompt.columns]
    assert all(sorted(rows[at : at + 3]) == ["a", "b", "c"] for at in range(0, len(rows) - 2, 3))
    assert (
        len({tuple(rows[at : at + 3]) for at in range(0, len(rows) - 2, 3)}) > 1
    )  # another order each epoch
    text = tokenizer.decode(next(prompt.ids for prompt in drawn if prompt.columns.get("id") == "a"))
    assert "Be brief." in text and text.endswith("<｜User｜>the model<｜Assistant｜>")
