"""Rewards: TRL's calling convention, weights with None, crashes that name the sample, verl's functions."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dsv3.common.errors import Failure, UserError
from dsv3.evaluate import tasks
from dsv3.evaluate.rewards import (
    Rewards,
    boxed_reward,
    format_reward,
    from_verl,
    soft_overlong,
    task_reward,
)

ROWS = [tasks.get(name).sample(3) for name in ("sums", "reversing", "countdown", "instructions")]


def columns(examples: list[tasks.Example]) -> dict[str, list[Any]]:
    rows = [example.row() for example in examples]
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}


def test_task_reward_asks_each_rows_verifier() -> None:
    right = [tasks.get(e.task).solve(e).reasoned() for e in ROWS]  # type: ignore[union-attr]
    prompts = [example.prompt for example in ROWS]
    given = columns(ROWS)
    assert task_reward(prompts, right, **given) == [1, 1, 1, 1]
    messages = [[{"role": "assistant", "content": text}] for text in right]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert task_reward(chats, messages, **given, trainer_state=None) == [1, 1, 1, 1]
    assert task_reward(prompts[:3], right[1:], **{k: v[:3] for k, v in given.items()}) == [0, 0, 0]
    texts = {**given, "metadata": [json.dumps(facts) for facts in given["metadata"]]}
    assert task_reward(prompts, right, **texts) == [1, 1, 1, 1]
    given["task"][1] = None
    assert task_reward(prompts, right, **given) == [1, None, 1, 1]
    assert task_reward(["p"], ["c"], solution=["1"]) == [None]


def test_boxed_reward() -> None:
    said = ["\\boxed{0.5}", "\\boxed{3}", "3", "<think>\\boxed{3}", "anything", "\\boxed{x}"]
    gold = ["so it is \\boxed{\\frac12}", "4", "3", "3", None, "7"]
    assert boxed_reward(said, said, solution=gold) == [1, 0, 0, 0, None, 0]
    assert boxed_reward(said, said, ground_truth=gold) == [1, 0, 0, 0, None, 0]
    assert boxed_reward(said, said) == [None] * 6


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_algebra_is_judged_from_threads_and_given_up_in_time() -> None:
    pairs = [("(x+1)^2", "x^2+2x+1", 1), ("(x+1)^2", "x^2+2x", 0), ("\\sqrt{8}", "2\\sqrt{2}", 1)]
    boxed_reward([""], ["\\boxed{x}"], solution=["y"])  # the service has started
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda p: boxed_reward([""], [f"\\boxed{{{p[0]}}}"], solution=p[1:2]), pairs))
    assert found == [[score] for _, _, score in pairs]
    begun = time.monotonic()
    assert boxed_reward([""], ["\\boxed{9^{9^{9^9}}}"], solution=["x^2"]) == [0]
    assert time.monotonic() - begun < 30
    assert boxed_reward([""], ["\\boxed{\\sqrt{8}}"], solution=["2\\sqrt{2}"]) == [1]


def test_format_reward() -> None:
    good = "<think>\nso\n</think>\n\n\\boxed{1}"
    bad = ["\\boxed{1}", "<think>so \\boxed{1}", "<think></think>\\boxed{1}", "<think>a</think>1", good * 2,
           "x" + good, "<think>a</think>\\boxed{}", "<think>a</think>\\boxed{1}\\boxed{2}"]  # fmt: skip
    assert format_reward([""] * 9, [good, *bad]) == [1] + [0] * 8
    assert format_reward(["Question<think>\n"], [good.removeprefix("<think>")]) == [1]
    assert format_reward(["Question<think>\n"], [good]) == [0]
    assert format_reward([""], ["<think>a</think>1"], box=False) == [1]


def test_soft_overlong_is_dapos() -> None:
    lengths = [0, 60, 80, 90, 100, 500]
    scores = soft_overlong(100, 20)(
        prompts=[], completions=[""] * 6, completion_ids=[[0] * n for n in lengths]
    )
    assert scores == [0, 0, 0, -0.5, -1, -1]
    with pytest.raises(UserError, match=r"cache \(0\)"):
        soft_overlong(100, 0)


def test_weights_and_none() -> None:
    def one(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [1.0, None, None]

    async def two(
        prompts: list[str], completions: list[str], bonus: list[float], **_: Any
    ) -> list[float | None]:
        await asyncio.sleep(0)
        return [bonus[0], bonus[1], None]

    scores = Rewards([one, two], weights=[0.5, -2])(["a"] * 3, ["b"] * 3, bonus=[1, 3, 5], trainer_state=None)
    assert scores.total == [0.5 - 2, -6, None]
    assert scores.by_function == {"one": [1, None, None], "two": [1, 3, None]}
    assert scores.crashes == []


def test_a_crash_names_the_sample(capsys: pytest.CaptureFixture[str]) -> None:
    def fragile(prompts: list[str], completions: list[str], id: list[str], **_: Any) -> list[float]:
        return [1 / len(text) for text in completions]

    batch = (["q"] * 3, ["a", "", "ccc"])
    with pytest.raises(
        Failure, match=r"fragile failed on sample s1 \(''\): ZeroDivisionError.*test_rewards.py"
    ):
        Rewards([fragile])(*batch, id=["s0", "s1", "s2"])
    scores = Rewards([fragile], on_crash="skip")(*batch, id=["s0", "s1", "s2"])
    assert scores.total == [1, None, 1 / 3] and len(scores.crashes) == 1
    assert "sample s1" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [[1.0], [math.nan, 1.0], ["x", 1.0], 3, None])
def test_what_is_no_list_of_rewards_is_refused(bad: Any) -> None:
    with pytest.raises(Failure, match="lambda"):
        Rewards([lambda prompts, completions: bad])(["a", "b"], ["c", "d"])


def test_a_function_that_fails_on_batches_only() -> None:
    def picky(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0]

    with pytest.raises(Failure, match="picky failed on a batch of 2"):
        Rewards([picky])(["a", "b"], ["c", "d"])
    assert Rewards([picky], on_crash="skip")(["a", "b"], ["c", "d"]).total == [1, 1]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="share a name"):
        Rewards([format_reward, format_reward])
    with pytest.raises(UserError, match="reward_weights"):
        Rewards([format_reward], weights=[1, 2])
    with pytest.raises(UserError, match="reward_weights"):
        Rewards([format_reward], weights=[math.nan])
    with pytest.raises(UserError, match="empty"):
        Rewards([])
    with pytest.raises(UserError, match="on_crash"):
        Rewards([format_reward], on_crash="never")  # type: ignore[arg-type]


def test_verls_functions() -> None:
    seen: list[Any] = []

    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
        seen.append((data_source, extra_info))
        return {"score": solution_str == ground_truth, "acc": 1} if extra_info else 0.25

    reward = from_verl(compute_score)
    found = Rewards([reward])(
        ["q"] * 3, ["a", "b", "c"], data_source=["x", "y", "z"], extra_info=[{"index": 1}, None, None],
        reward_model=[{"style": "rule", "ground_truth": "a"}, {"ground_truth": "b"}, None],
    )  # fmt: skip
    assert found.by_function == {"compute_score": [1, 0.25, None]}
    assert seen == [("x", {"index": 1}), ("y", None)]
    assert reward(prompts=["q"], completions=["a"], ground_truth=["a"]) == [0.25]
