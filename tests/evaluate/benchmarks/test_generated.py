"""Generated tasks as benchmarks: only held-out examples, each once, judged by the task's own verifier."""

from __future__ import annotations

import pytest

from dsv3.common.errors import UserError
from dsv3.data.special import ASSISTANT, BOS, USER
from dsv3.evaluate import tasks
from dsv3.evaluate.benchmarks.generated import generated
from dsv3.evaluate.tasks.base import split_of
from dsv3.serve.llm import LLM


def test_only_held_out_examples_each_once() -> None:
    asked = generated("sums:2", 20)
    assert asked.questions == generated("sums:2", 20).questions
    ids = [question.id for question in asked.questions]
    assert len(ids) == len(set(ids)) == 20
    assert {split_of(identifier) for identifier in ids} == {"test"}
    assert len(generated("products:1", 60).questions) < 20  # 64 pairs of digits in all, 2 of 16 held out


def test_the_judge_knows_solutions_from_wrong_answers() -> None:
    for name in ("sums:3", "gcd", "letters", "countdown:2", "instructions:2"):
        asked = generated(name, 6)
        task = tasks.get(name.split(":")[0], int(name[-1]) if ":" in name else 1)
        solved = [task.solve(tasks.Example(**question.reference)).reasoned() for question in asked.questions]
        assert [score["accuracy"] for score in asked.judge(asked.questions, solved)] == [1.0] * 6
        wrong = asked.judge(asked.questions, ["", "\\boxed{}", "\\boxed{-7.25}"] * 2)
        assert name.startswith("instructions") or all(score["accuracy"] == 0 for score in wrong)
        assert wrong[0]["accuracy"] < 1


def test_a_conversation_or_plain_text_after_examples(llm: LLM) -> None:
    chat, plain = generated("gcd", 3), generated("gcd", 3, chat=False)
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    for one, other in zip(chat.questions, plain.questions):
        assert one.id == other.id
        text = one.reference["prompt"]
        assert tokenizer.decode(one.token_ids(tokenizer)) == f"{BOS}{USER}{text}{ASSISTANT}"
        assert isinstance(other.prompt, str)
        *shots, last = other.prompt.split("Question: ")[1:]
        assert last == f"{text}\nAnswer:" and len(shots) == plain.shots == 4
        assert all("\\boxed{" in shot for shot in shots) and text not in "".join(shots)
        assert tokenizer.decode(other.token_ids(tokenizer)) == other.prompt


@pytest.mark.parametrize(
    "name, said", [("smus", "did you mean sums"), ("sums:9", "from 1 to 5"), ("sums:x", "from 1 to 5")]
)
def test_unknown_names_and_difficulties(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        generated(name)
