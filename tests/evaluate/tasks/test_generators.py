"""Our own generators: solver against direct computation, verifier against both and perturbed answers."""

from __future__ import annotations

import ast
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.common.errors import Failure, UserError
from dsv3.evaluate.tasks import GENERATORS, SPLITS, Example, Task, get
from dsv3.evaluate.tasks.base import Facts, Generator, split_of
from dsv3.evaluate.tasks.instructions import CONSTRAINTS, Instructions
from dsv3.evaluate.tasks.numbers import Countdown

anywhere = st.tuples(st.integers(1, 5), st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(SPLITS))


@pytest.mark.parametrize("name", [*GENERATORS, "instructions"])
@given(where=anywhere)
@settings(max_examples=25, deadline=None)
def test_solutions_are_accepted(name: str, where: tuple[int, int, int, str]) -> None:
    difficulty, seed, index, split = where
    task = get(name, difficulty, seed)
    assert isinstance(task, Task)
    example = task.sample(index, split)
    assert get(name, difficulty, seed).sample(index, split) == example
    assert Example(**json.loads(json.dumps(vars(example)))) == example  # as a row of a file
    assert split_of(example.id) == split
    solution = task.solve(example)
    assert solution is not None
    assert task.verify(solution.plain(), example) == task.verify(solution.reasoned(), example) == 1
    if name in GENERATORS:
        assert solution.reasoning and solution.answer == example.answer
        assert task.verify(f"\\boxed{{{example.answer}}}", example) == 1
        assert task.verify(f"<think>\\boxed{{{example.answer}}}</think>none", example) == 0
        assert task.verify(example.answer, example) == 0  # not boxed


@pytest.mark.parametrize("name", GENERATORS)
@given(where=anywhere, noise=st.sampled_from(["1", "x", "-1", "b", ", 3"]), front=st.booleans())
@settings(max_examples=25, deadline=None)
def test_perturbed_answers_are_refused(
    name: str, where: tuple[int, int, int, str], noise: str, front: bool
) -> None:
    task = get(name, *where[:2])
    example = task.sample(where[2], where[3])  # type: ignore[arg-type]
    wrong = noise + example.answer if front else example.answer + noise
    assert task.verify(f"\\boxed{{{wrong}}}", example) == 0
    other = task.sample(where[2] + 1, where[3])  # type: ignore[arg-type]
    if other.answer != example.answer and name != "countdown":
        assert task.verify(f"\\boxed{{{other.answer}}}", example) == 0


@pytest.mark.parametrize("name", [*GENERATORS, "instructions"])
def test_splits_share_no_content(name: str) -> None:
    """Whatever seed and difficulty each side uses."""
    seen = {
        split: {get(name, difficulty, seed).sample(index, split).prompt
                for difficulty in (1, 2) for seed in (at, at + 3) for index in range(40)}
        for at, split in enumerate(SPLITS)
    }  # fmt: skip
    assert len(seen["train"]) > 20
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not seen[one] & seen[other]


def test_examples_stay_what_they_were() -> None:
    """A change of these lines changes every published number: seeds are promises."""
    found = {name: (get(name, 2).sample(7).prompt, get(name, 2).sample(7).answer) for name in GENERATORS}
    assert found == KNOWN


KNOWN = {
    "sums": ("What is 16 + 6?", "22"),
    "products": ("What is 19 * 6?", "114"),
    "gcd": ("What is the greatest common divisor of 49 and 49?", "49"),
    "bases": ("Write 30 in base 2.", "11110"),
    "fractions": ("What is 1/2 - 4/6?", "-1/6"),
    "sequences": ("What comes next: 7, 21, 63, 189, 567?", "1701"),
    "countdown": ("Use each of 4, 5, 3 once with + - * to make 12.", "3 + (4 + 5)"),
    "sorting": ("Sort from smallest to largest: 2, 12, 3, 0", "0, 2, 3, 12"),
    "largest": ("What is the largest of 8, 15, 14, 0?", "15"),
    "smallest": ("What is the smallest of 14, 0, 2, 13?", "0"),
    "backwards": ("Write from last to first: 9, 16, 14, 13", "13, 14, 16, 9"),
    "evens": ("Which of 17, 7, 20, 16 are even?", "20, 16"),
    "letters": ('How many times is the letter "i" in "pukebri"?', "1"),
    "reversing": ('Spell "gepleso" backwards.', "oselpeg"),
}


@given(where=anywhere)
@settings(max_examples=40, deadline=None)
def test_each_line_of_arithmetic_is_true(where: tuple[int, int, int, str]) -> None:
    for name in ("sums", "products", "gcd", "countdown"):
        task = get(name, *where[:2])
        solution = task.solve(task.sample(where[2], where[3]))  # type: ignore[arg-type]
        assert solution is not None
        for line in solution.reasoning.splitlines():
            left, right = line.split(" = ")
            assert re.fullmatch(r"[-\d+* ()]+", line.replace("=", ""))
            assert eval(left) == eval(right), line


def test_countdown_takes_any_way_and_no_other() -> None:
    task = Countdown(2)
    facts: Facts = {"numbers": [2, 3, 4], "target": 14}
    for text in ("2 + 3 * 4", "4*3+2", "(3 \\times 4) + 2", "2 + 3 * 4 = 14"):
        assert task.accepts(text, facts), text
    for text in ("14", "7 * 2", "2 + 3 * 4 + 0", "2 + 12", "2 ** 3 + 4", "4 * 3 + 2.0", "__import__('os')",
                 "3*4+2 or 1", "(" * 5000, "-2 + 4 * 4"):  # fmt: skip
        assert not task.accepts(text, facts), text


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_each_constraint_refuses_what_breaks_it(kind: str) -> None:
    broken = {
        "at_least": "a few words", "at_most": "word " * 60, "include": "nothing of it", "exclude": None,
        "letter": "no such one", "no_commas": "one, two", "placeholders": "none", "start": "No beginning",
        "end": "no such close", "bullets": "no list", "paragraphs": "one only", "lowercase": "Upper",
        "uppercase": "lower", "quoted": '"half',
    }  # fmt: skip
    from random import Random

    constraint = CONSTRAINTS[kind]
    for seed in range(10):
        value = constraint.draw(Random(seed))
        text = broken[kind] or f"so {value} it goes"
        assert not constraint.check(text, value), (kind, value)
        assert not constraint.check("", value), kind


def test_part_of_the_instructions_earns_part_of_the_score() -> None:
    task = Instructions(2)
    example = Example("", "instructions", "", "", {"asked": {"no_commas": True, "lowercase": True}})
    assert [task.verify(text, example) for text in ("fine", "Half fine", "Not, at all")] == [1, 0.5, 0]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"task \(sum\) is unknown \(did you mean sums\?\)"):
        get("sum")
    with pytest.raises(UserError, match=r"difficulty \(6\) of gcd"):
        get("gcd", 6)
    with pytest.raises(UserError, match=r"index \(-1\)"):
        get("gcd").sample(-1)
    with pytest.raises(UserError, match=r"split \(dev\)"):
        get("gcd").sample(0, "dev")  # type: ignore[arg-type]

    class One(Generator):
        name = "one"

        def facts(self, rng: object) -> Facts:
            return {"n": 1}

        prompt = correct = lambda self, facts: "1"
        steps = lambda self, facts: ("", "1")  # noqa: E731

    empty = next(split for split in SPLITS if split != split_of(One().sample(0, split_of_one()).id))
    with pytest.raises(Failure, match="no example"):
        One().sample(0, empty)


def split_of_one() -> str:
    from dsv3.evaluate.tasks.base import content_id

    return split_of(content_id("one", {"n": 1}))


def test_the_verifiers_evaluate_nothing() -> None:
    """No eval and no exec where a model's words are judged in this process."""
    from pathlib import Path

    import dsv3.evaluate.verify as verify

    folder = Path(verify.__file__).parent
    for path in (
        folder / "verify.py",
        *(folder / "tasks" / f"{n}.py" for n in ("numbers", "lists", "words", "instructions")),
    ):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "__import__"}, path
