"""GRPO on several processes: what it samples, tells and learns is what one process does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.weights import Weights
from dsv3.common.errors import UserError
from dsv3.config.grpo import GRPORecipe
from dsv3.train.grpo.rollouts import Answer
from dsv3.train.grpo.run import grpo
from dsv3.train.run import read_lines
from tests.parallel.ranks import run_ranks

Make = Callable[..., GRPORecipe]
APART = {  # clocks; what TRL calls a metric of a call of the reward function
    "step_time", "rollout_time", "tokens_per_second", "memory_bytes", "max_violation", "expert_load", "seen"
}  # fmt: skip


def train(runs: list[tuple[dict[str, Any], str | None]]) -> None:
    """In a rank: recipes, each with the checkpoint it goes on from."""
    for run, resume in runs:
        grpo(GRPORecipe.model_validate(run), resume)


def numbers(out: Path) -> dict[tuple[int, bool], dict[str, Any]]:
    """Lines of metrics by step, those of a step apart from those of an evaluation."""
    return {(line["step"], "loss" in line): line for line in read_lines(out / "metrics.jsonl")}


def same(out: Path, one: Path, first: int = 0) -> None:
    found = {key: line for key, line in numbers(out).items() if key[0] >= first}
    wanted = {key: line for key, line in numbers(one).items() if key[0] >= first}
    assert found.keys() == wanted.keys() and found
    for key, line in wanted.items():
        assert found[key].keys() == line.keys(), key
        for name, value in line.items():
            if name not in APART:
                assert found[key][name] == pytest.approx(value, rel=1e-4, abs=2e-6), (key, name)
    samples, others = ([s for s in read_lines(f / "samples.jsonl") if s["step"] >= first] for f in (out, one))
    assert samples == others
    with Weights(out / "model") as ours, Weights(one / "model") as theirs:
        for name in theirs.entries:
            x, y = (held.file_of(name).read(name) for held in (ours, theirs))
            assert torch.allclose(x, y, atol=2e-5), name


@pytest.mark.slow
def test_two_ranks_are_one(make: Make, tmp_path: Path) -> None:
    """Two minibatches a batch of rollouts, a reference, drafts, replayed routing; rewards that log.

    A run of one process goes on on two and the other way round, in the middle of a batch of rollouts.
    """

    def recipe(name: str) -> dict[str, Any]:
        made = make(
            out=str(tmp_path / name), tasks=[{"name": "sums"}], evaluation={"every": 2, "examples": 3},
            policy={"preset": "deepseekmath", "redraw": 1},
            rollouts={"minibatches": 2, "replay_routing": True},
            steps=5, checkpoint={"every": 1, "keep": 10}, optimizer={"lr": 1e-3},
            rewards=[{"function": "task"}, {"function": make().rewards[0].function, "weight": 0.5}],
        )  # fmt: skip
        return made.model_dump(mode="json")

    function = "tests.train.grpo.test_ranks:train"
    run_ranks(0, function, [[recipe("one"), None]])
    middle = str(tmp_path / "one/checkpoints/step-000003")
    run_ranks(2, function, [[recipe("two"), None], [recipe("wider"), middle]], timeout=280)
    run_ranks(0, function, [[recipe("narrower"), str(tmp_path / "two/checkpoints/step-000003")]])
    seen = [numbers(tmp_path / name)[1, True]["seen"] for name in ("one", "two")]
    assert seen == [32, 16]  # completions that a reward function is called with
    same(tmp_path / "two", tmp_path / "one")
    same(tmp_path / "wider", tmp_path / "one", first=4)
    same(tmp_path / "narrower", tmp_path / "one", first=4)


def test_an_answer_told_to_other_ranks() -> None:
    routes = torch.randint(0, 200, (5, 3, 2), dtype=torch.int16)
    for answer in (
        Answer([1, 2], [-0.1, -1e-9], "a\n", True, routes),
        Answer([], [], "", False, None),
    ):
        heard = Answer.of_plain(json.loads(json.dumps(answer.plain())))
        assert heard.tokens == answer.tokens and heard.logprobs == answer.logprobs
        assert (heard.text, heard.whole) == (answer.text, answer.whole)
        assert (heard.routes is None) == (answer.routes is None)
        assert answer.routes is None or torch.equal(heard.routes, answer.routes)  # type: ignore[arg-type]


@pytest.mark.parametrize("parallel", [{"expert": 2}, {"pipeline": 2}, {"context": 2}, {"zero": 3}])
def test_layouts_without_whole_models_are_refused(make: Make, parallel: dict[str, int]) -> None:
    recipe = make(parallel=parallel)
    with pytest.raises(UserError, match=rf"parallel\.{next(iter(parallel))} .* samples from whole models"):
        grpo(recipe)
    assert not Path(recipe.out).exists()


def test_answers_that_ranks_cannot_share(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3.parallel.layout import Layout
    from dsv3.parallel.world import World
    from dsv3.train.grpo import run

    monkeypatch.setattr(run, "enter", lambda *_: World(Layout(1, 1, 3, 1)))
    with pytest.raises(
        UserError, match=r"batch.micro_sequences \(8\) must be a multiple of the 3 data ranks"
    ):
        grpo(make())
