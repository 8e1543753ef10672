"""Verifiable tasks by name: ``get("sums", difficulty=2, seed=1).sample(0)``."""

from __future__ import annotations

from dsv3.common.errors import UserError, nearest
from dsv3.evaluate.tasks.base import DIFFICULTIES, SPLITS, Example, Generator, Solution, Split, Task
from dsv3.evaluate.tasks.lists import Backwards, Evens, Largest, Smallest, Sorting
from dsv3.evaluate.tasks.numbers import (
    Bases,
    Countdown,
    Fractions,
    GreatestDivisor,
    Products,
    Sequences,
    Sums,
)
from dsv3.evaluate.tasks.words import Letters, Reversing

__all__ = [
    "DIFFICULTIES",
    "GENERATORS",
    "SPLITS",
    "Example",
    "Solution",
    "Split",
    "Task",
    "describe",
    "get",
    "names",
]

GENERATORS: dict[str, type[Generator]] = {
    kind.name: kind
    for kind in (
        Sums, Products, GreatestDivisor, Bases, Fractions, Sequences, Countdown,
        Sorting, Largest, Smallest, Backwards, Evens, Letters, Reversing,
    )
}  # fmt: skip


def names() -> list[str]:
    """Every name :func:`get` knows here; reasoning-gym's only where it is installed."""
    from dsv3.evaluate.tasks import gym

    return [*GENERATORS, "instructions", "doctests", *gym.names()]


def describe(name: str) -> str:
    """What a name of :func:`names` asks for, in a line."""
    from dsv3.evaluate.tasks.doctests import Doctests
    from dsv3.evaluate.tasks.instructions import Instructions

    kind = {**GENERATORS, "instructions": Instructions, "doctests": Doctests}.get(name)
    return "reasoning-gym's" if kind is None else str(kind.__doc__).partition("\n")[0].rstrip(".")


def get(name: str, difficulty: int = 1, seed: int = 0) -> Task:
    """The task ``name``; ``gym/NAME`` is reasoning-gym's. Raises :class:`UserError` for a name unknown."""
    if name in GENERATORS:
        return GENERATORS[name](difficulty, seed)
    if name == "instructions":
        from dsv3.evaluate.tasks.instructions import Instructions

        return Instructions(difficulty, seed)
    if name == "doctests":
        from dsv3.evaluate.tasks.doctests import Doctests

        return Doctests(difficulty, seed)
    if name.startswith("gym/"):
        from dsv3.evaluate.tasks.gym import GymTask

        return GymTask(name.removeprefix("gym/"), difficulty, seed)
    raise UserError(f"task ({name}) is unknown{nearest(name, names())}; `dsv3 tasks list` shows them all")
