"""A model as a judge: what is read of its words, votes, retries, and pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.tokenizer import train
from dsv3.evaluate import tasks
from dsv3.evaluate.experts import Answer, Question
from dsv3.evaluate.judge import (
    HIGHEST,
    Judge,
    judge_pairs,
    judgement_prompt,
    parse_score,
    written_judgement,
)
from dsv3.evaluate.rewards import Rewards
from tests.evaluate.test_experts import engine_of, recipe_of


class Scripted:
    """Judges by what stands in the answer; what it says to each try is listed."""

    def __init__(self, **said: list[list[str]]):
        self.said = {**said, "# Answer\n": [["?"]]}  # an empty answer
        self.asked: list[str] = []

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[Question, list[Answer]]]:
        for question in reversed(questions):  # in any order
            self.asked.append(question.prompt)
            word = next(word for word in self.said if question.prompt.endswith(word))
            tries = self.said[word]
            texts = tries.pop(0) if len(tries) > 1 else tries[0]
            yield question, [Answer(text, "length" if text == "cut" else "stop") for text in texts]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>well\\boxed{3}</think>\\boxed{8}", 0.8), ("\\boxed{10}", 1), ("\\boxed{0}", 0),
        ("\\boxed{ 7 }", 0.7), ("\\boxed{7.5}", 0.75), ("\\boxed{8/10}", 0.8), ("\\boxed{11}", None),
        ("\\boxed{-1}", None), ("\\boxed{ten}", None), ("10", None), ("<think>\\boxed{8}", None),
        ("\\boxed{8\\%}", None), ("\\boxed{", None), ("", None),
    ],
)  # fmt: skip
def test_parse_score(text: str, score: float | None) -> None:
    assert parse_score(text) == (None if score is None else pytest.approx(score))


@pytest.mark.parametrize("name", tasks.GENERATORS)
@given(index=st.integers(0, 10**6), difficulty=st.integers(1, 5), right=st.booleans())
def test_written_judgements_are_read_as_they_were_meant(
    name: str, index: int, difficulty: int, right: bool
) -> None:
    task = tasks.get(name, difficulty)
    solution = task.solve(task.sample(index))
    assert solution is not None
    answer = solution.plain() if right else "\\boxed{nothing}"
    text = written_judgement(solution, answer, float(right))
    assert parse_score(text) == float(right)
    assert f"right: {solution.answer}" in text and ("nothing" in text) is not right


def test_the_judge_reads_question_and_answer_as_they_are() -> None:
    prompt = judgement_prompt("What {is} it?", "a {set} \\boxed{1}")
    assert prompt.endswith("# Question\nWhat {is} it?\n\n# Answer\na {set} \\boxed{1}")
    assert f"to {HIGHEST}" in prompt and "in \\boxed{}." in prompt


def test_votes_are_averaged_and_the_unreadable_asked_again() -> None:
    expert = Scripted(
        good=[["\\boxed{10}", "\\boxed{8}", "no idea", "cut"]],
        late=[["what?", "cut"], ["\\boxed{4}", "?"]],
        never=[["what?", "\\boxed{99}"]],
    )
    judge = Judge(expert, tries=3)
    scores = judge(["q"] * 4, ["good", "late", "never", "<think>good"])
    assert scores[:3] == [pytest.approx(0.9), pytest.approx(0.4), None]
    assert scores[3] is None and len(expert.asked) == 1 + 2 + 3 + 3


def test_it_is_a_reward_function_with_none_where_it_cannot_tell() -> None:
    judge = Judge(Scripted(good=[["\\boxed{10}"]], bad=[["?"]]), tries=1)
    messages = [[{"role": "assistant", "content": "<think>bad</think>good"}]]
    scores = Rewards({"judge": judge}, [2.0])(
        [[{"role": "user", "content": "q"}], "q"], [messages[0], "bad"], id=["a", "b"]
    )
    assert scores.total == [2.0, None] and Rewards([judge]).functions == {"judge": judge}


def test_pairs_are_judged_apart() -> None:
    expert = Scripted(good=[["\\boxed{9}", "\\boxed{7}"]], bad=[["\\boxed{2}"]], odd=[["?"]])
    rows = [
        {"prompt": "one", "chosen": "good", "rejected": "bad"},
        {"prompt": "two", "chosen": "bad", "rejected": "good"},
        {"prompt": "three", "chosen": "good", "rejected": "odd"},
        {"prompt": "one", "chosen": "good", "rejected": "good"},
    ]
    found, judged = judge_pairs(Judge(expert, tries=1), rows)
    assert found.value == (1 + 0 + 0.5 + 0.5) / 4 and found.pairs == 4 and found.decided == 2
    assert judged[0]["chosen_votes"] == [0.9, 0.7] and judged[0]["rejected_score"] == 0.2
    assert judged[2]["rejected_score"] is None
    assert len(expert.asked) == 6  # what was asked before is not asked again


def test_a_real_engine_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train(["Judge the answer to the question. First think, then give a number"] * 9, 360)
    recipe = recipe_of(
        expert={"kind": "engine", "model": "given", "concurrency": 4},
        sampling={"samples": 2, "max_tokens": 4}, system="",
    )  # fmt: skip
    judge = Judge(engine_of(tokenizer, recipe, 4), tries=2)
    assert judge(["one?", "two?"], ["1", "2"]) == [None, None]  # random words are no score
