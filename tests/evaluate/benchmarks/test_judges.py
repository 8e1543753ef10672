"""Judges beside the scores a person would give, and programs in the sandbox."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsv3.evaluate.benchmarks.build import build
from dsv3.evaluate.benchmarks.judges import math, number, short
from dsv3.evaluate.benchmarks.run import run
from dsv3.serve.llm import LLM
from tests.evaluate.benchmarks import package


@pytest.mark.parametrize(
    "answer, reference, exact, f1",
    [
        (" The Sunset Boulevard.", [["Sunset Blvd"], ["sunset boulevard"]], 1, 1),
        (" Sunset\nQuestion: more", [["Sunset Boulevard"]], 0, 2 / 3),
        ("<think>Paris</think>London", [["Paris"]], 0, 0),
        ("<think>no</think>Paris", [["Paris"]], 1, 1),
        ("\\boxed{London}", [["london"]], 1, 1),
        (" 1,200", [["1200"]], 1, 1),
        (" 1201 men", [["1200 men"]], 0, 0),  # another number is no half of an answer
        (" Bob, Ann", [["Ann", "Bob"]], 1, 1),
        (" Bob", [["Ann", "Bob"]], 0, 1 / 2),
        (" Ann, Bob, Eve", [["Ann", "Bob"]], 0, 2 / 3),
        (" well-known man", [["well known"]], 0, 4 / 5),
        ("", [["Ann"]], 0, 0),
    ],
)  # fmt: skip
def test_short_answers(answer: str, reference: list[list[str]], exact: float, f1: float) -> None:
    assert short(answer, reference) == {"exact_match": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    "answer, wanted, right",
    [
        (" 9 * 2 = $18. So the answer is 18.", "18", 1),
        (" So the answer is $1,800.00 a day.", "1800", 1),
        (" it was - 3 degrees. So the answer is - 3.", "-3", 1),
        (" 16 - 3 = 13", "13", 1),
        (" 16 - 3 = 13 \\boxed{12}", "13", 0),
        (" So the answer is 17, not 18", "18", 0),
        ("<think>18</think>", "18", 0),
        ("no idea", "18", 0),
    ],
)  # fmt: skip
def test_numbers(answer: str, wanted: str, right: float) -> None:
    assert number(answer, [[wanted]]) == {"exact_match": right}


@pytest.mark.parametrize(
    "answer, right",
    [
        (r"so \boxed{\frac{1}{2}}", 1),
        (r"Final Answer: The final answer is $\frac12$. I hope it is correct.", 1),
        (r"The final answer is $\frac13$. I hope it is correct.", 0),
        (r"\frac{1}{2}", 0),
    ],
)
def test_mathematics(answer: str, right: float) -> None:
    assert math(answer, r"Hence $x = \boxed{\dfrac{1}{2}}$.") == {"exact_match": right}


def test_programs(tmp_path: Path) -> None:
    package.write(tmp_path)
    human, mbpp = build("humaneval", tmp_path), build("mbpp", tmp_path)
    answers = {
        "    return 2 * x\n": 1.0,
        "    return x\n": 0.0,
        "    raise SystemExit(0)\n": 0.0,  # leaves before the test
        "    while True: pass\n": 0.0,
        "Here it is:\n```python\ndef double(x):\n    return x + x\n```\nDone.": 1.0,
        "<think>\n    return 2 * x\n": 0.0,
    }
    asked = human.questions * len(answers)
    assert human.judge is not None and mbpp.judge is not None
    assert [s["pass@1"] for s in human.judge(asked, list(answers))] == list(answers.values())
    assert len(mbpp.questions) == 2 and "assert add(1) == 1\n[BEGIN]" in mbpp.questions[0].prompt
    assert mbpp.questions[0].prompt.count("[DONE]") == 3 and "\r" not in mbpp.questions[0].prompt
    found = mbpp.judge(mbpp.questions, ["def add(x):\n    return x\n"] * 2)
    assert [score["pass@1"] for score in found] == [1.0, 0.0]


def test_all_kinds_in_one_run(llm: LLM, tmp_path: Path) -> None:
    package.write(tmp_path)
    names = ("winogrande", "gsm8k", "humaneval")
    asked = [replace(build(name, tmp_path, samples=2), max_tokens=8) for name in names]
    results = run(llm, asked, tmp_path / "out", {})
    for name, metric in zip(names, ("acc", "exact_match", "pass@1")):
        found = results["tasks"][name]
        assert found["metric"] == metric and 0 <= found[metric] <= 1
    assert results["tasks"]["humaneval"]["pass@1_stderr"] is None
