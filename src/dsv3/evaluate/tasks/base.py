"""What a verifiable task is: examples drawn without end, a verifier, and often a solver that shows its steps.

``sample(index, split)`` is a pure function of (task, seed, difficulty, index, split). Held-out examples are
never seen in training, whatever seeds and difficulties are used where: the hash of an example's *content*
says which split it may appear in, and draws are repeated until one falls right.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, Protocol, runtime_checkable

from dsv3.common.errors import Failure, UserError
from dsv3.evaluate.verify import boxed, equal, outside_thought

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DIFFICULTIES = range(1, 6)
DRAWS = 2000  # before a split is held to be empty

Facts = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One question. ``id``: hash of its content; ``metadata``: JSON values the verifier needs."""

    id: str
    task: str
    prompt: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Columns of a dataset: the reward functions receive them by name (TRL's convention)."""
        return {
            "prompt": self.prompt, "task": self.task, "answer": self.answer,
            "metadata": self.metadata, "id": self.id,
        }  # fmt: skip


@dataclass(frozen=True)
class Solution:
    """Steps (empty where none are known) and their answer. ``response``: how it is written, else boxed."""

    reasoning: str
    answer: str
    response: str = ""

    def plain(self) -> str:
        """The original answer of report 5.1's first kind of sample."""
        return self.response or f"\\boxed{{{self.answer}}}"

    def reasoned(self) -> str:
        """The reasoning answer of the second kind: thoughts between ``<think>`` tags, then the answer."""
        return f"<think>\n{self.reasoning}\n</think>\n\n{self.plain()}" if self.reasoning else self.plain()


@runtime_checkable
class Task(Protocol):
    """A source of examples and their judge.

    ``solve`` returns None where no steps are known. ``verify`` reads a whole completion, thoughts included,
    and returns a score from 0 to 1.
    """

    name: str

    def sample(self, index: int, split: Split = "train") -> Example: ...

    def solve(self, example: Example) -> Solution | None: ...

    def verify(self, completion: str, example: Example) -> float: ...


def content_id(task: str, content: Any) -> str:
    """16 hex digits of the content alone: the same question has them under every seed and difficulty."""
    text = json.dumps([task, content], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_of(identifier: str) -> Split:
    """Where content may appear: 13 of 16 parts train, 1 validation, 2 test."""
    part = int(identifier[-1], 16)
    return "train" if part < 13 else "validation" if part == 13 else "test"


def seeded(*parts: object) -> Random:
    """A generator whose numbers depend on the parts alone, on every machine."""
    return Random(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big"))


def checked(index: int, split: str) -> None:
    """Refuse an index or a split that does not exist."""
    if index < 0:
        raise UserError(f"index ({index}) must be 0 or more")
    if split not in SPLITS:
        raise UserError(f"split ({split}) must be one of {', '.join(SPLITS)}")


class Generator(ABC):
    """A task of our own: ``facts`` make the question, and everything else follows from them.

    ``correct`` is a direct computation, ``steps`` works it out as a person would; the tests hold one against
    the other. ``difficulty`` runs from 1, where a tiny model can begin, to 5.
    """

    name: str

    def __init__(self, difficulty: int = 1, seed: int = 0):
        if difficulty not in DIFFICULTIES:
            raise UserError(f"difficulty ({difficulty}) of {self.name} must be from 1 to {DIFFICULTIES[-1]}")
        self.difficulty, self.seed = difficulty, seed

    @abstractmethod
    def facts(self, rng: Random) -> Facts:
        """Draw a question at ``self.difficulty``: JSON values that define it wholly."""

    @abstractmethod
    def prompt(self, facts: Facts) -> str: ...

    @abstractmethod
    def correct(self, facts: Facts) -> str: ...

    @abstractmethod
    def steps(self, facts: Facts) -> tuple[str, str]:
        """Reasoning and the answer it reaches."""

    def accepts(self, given: str, facts: Facts) -> bool:
        """Whether the boxed text is right."""
        return equal(given, self.correct(facts))

    def sample(self, index: int, split: Split = "train") -> Example:
        checked(index, split)
        rng = seeded(self.name, self.seed, self.difficulty, index, split)
        for _ in range(DRAWS):
            facts = self.facts(rng)
            identifier = content_id(self.name, facts)
            if split_of(identifier) == split:
                return Example(identifier, self.name, self.prompt(facts), self.correct(facts), facts)
        raise Failure(f"{self.name} at difficulty {self.difficulty} has no example for split {split}")

    def solve(self, example: Example) -> Solution:
        return Solution(*self.steps(example.metadata))

    def verify(self, completion: str, example: Example) -> float:
        given = boxed(outside_thought(completion))
        return float(given is not None and self.accepts(given, example.metadata))
