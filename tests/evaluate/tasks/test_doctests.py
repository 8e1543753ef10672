"""Code tasks out of docstrings: shown and hidden examples, scores from the sandbox, cheats earn nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3.evaluate.tasks import Example, doctests
from dsv3.evaluate.tasks.base import SPLITS, split_of
from dsv3.evaluate.tasks.doctests import Doctests, code_of

MODULE = '''
from __future__ import annotations
import math
from functools import reduce, partial
from elsewhere import other

def area(radius: Unknown, digits=2):
    """Area of a circle.

    >>> from homework import area
    >>> area(1)
    3.14
    >>> area(2)
    12.57
    >>> small = 0.5
    >>> area(small)
    0.79
    >>> area(0) == 0
    True
    """
    return round(math.pi * radius**2, digits)

def wrong(n):
    """
    >>> wrong(1)
    2
    >>> wrong(2)
    4
    """
    return n

def leans(n):
    """
    >>> leans(1)
    2
    >>> leans(2)
    3
    """
    return other(n)

def hangs(n):
    """
    >>> hangs(1)
    2
    >>> hangs(2)
    3
    """
    while True: pass

def total(items):
    """Sum.

    >>> total([1, 2])
    3
    >>> total([])
    0
    >>> print(total([4]))
    4
    """
    return reduce(lambda a, b: a + b, items, 0)

def constant(n):
    """
    >>> constant(1)
    7
    >>> constant(2)
    7
    """
    return 7
'''


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, doctests.Case]]:
    (tmp_path / "homework.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctests, "GOLD_SECONDS", 3)
    kept = doctests.kept.__wrapped__(("homework",))
    assert "homework" not in sys.modules  # read, not imported
    monkeypatch.setattr(doctests, "kept", lambda: kept)
    yield kept


def example(cases: dict[str, doctests.Case], name: str) -> Example:
    identifier = next(key for key, case in cases.items() if case.name == name)
    task = Doctests(5)
    return next(
        found for index in range(9) if (found := task.sample(index, split_of(identifier))).id == identifier
    )


def test_functions_that_stand_alone_are_kept(cases: dict[str, doctests.Case]) -> None:
    assert sorted(case.name for case in cases.values()) == ["area", "total"]


def test_hidden_examples_are_not_in_the_prompt(cases: dict[str, doctests.Case]) -> None:
    asked = example(cases, "area")
    assert asked.metadata["hidden"] == [3]  # not 4, which compares for itself
    assert "import math\ndef area(radius: Unknown, digits=2):" in asked.prompt
    assert (
        "functools" not in asked.prompt and "math.pi" not in asked.prompt and "homework" not in asked.prompt
    )
    assert "area(1)\n    3.14" in asked.prompt and "12.57" in asked.prompt and "0.79" not in asked.prompt


def test_scores(cases: dict[str, doctests.Case]) -> None:
    task = Doctests(5)
    asked = example(cases, "total")
    assert task.verify(task.solve(asked).reasoned(), asked) == 1
    attempts = {
        "```python\ndef total(items): return sum(items)\n```": 1,
        "def total(items): return sum(items)": 1,
        "It is easy.\n```\ndef total(items): return sum(items)\n```": 1,
        "```python\ndef total(items): return {(1, 2): 3}.get(tuple(items), 0)\n```": 0,  # the shown ones
        "```python\ndef total(items): print(4)\n```": 0,
        "```python\ndef total(items) return\n```": 0,
        "```python\nraise SystemExit(0)\n```": 0,
        "```python\nimport os; os._exit(0)\n```": 0,
        "```python\nclass E:\n  __eq__ = lambda s, o: True\ndef total(items): return E()\n```": 0,
        '```python\nimport os\nos.write(1, b\'["3", "0"]\\n\')\ndef total(items): pass\n```': 0,
        "<think>```python\ndef total(items): return sum(items)\n```": 0,
        "words": 0,
    }
    for completion, score in attempts.items():
        assert task.verify(completion, asked) == score, completion


def test_expected_outputs_stay_outside(
    cases: dict[str, doctests.Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = example(cases, "area")
    sent: list[str] = []
    run = doctests.Sandbox.run
    monkeypatch.setattr(
        doctests.Sandbox,
        "run",
        lambda self, source, stdin="": sent.append(source) or run(self, source, stdin),
    )
    Doctests(5).verify("```python\ndef area(r): return 1\n```", asked)
    assert len(sent) == 1 and "area(2)" in sent[0] and "12.57" not in sent[0]


def test_each_lap_has_every_function_once(cases: dict[str, doctests.Case]) -> None:
    for split in SPLITS:
        here = [key for key in cases if split_of(key) == split]
        if here:
            ids = [Doctests(5, seed=1).sample(index, split).id for index in range(2 * len(here))]
            assert sorted(ids[: len(here)]) == sorted(ids[len(here) :]) == sorted(here)


def test_code_is_found() -> None:
    assert code_of("```python\na\n```\nand\n```py\nb\n```") == "b\n"
    assert code_of("from x import y") == "from x import y"
    assert code_of("the answer") is None
