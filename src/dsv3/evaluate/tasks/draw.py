"""Different examples of a task, and rows of a dataset made of them and their solutions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dsv3.common.errors import UserError
from dsv3.evaluate.tasks import get
from dsv3.evaluate.tasks.base import Example, Split, Task

IN_VAIN = 1000  # draws in a row that bring nothing new, before a task is held to have no more


def named(name: str, seed: int = 0) -> Task:
    """The task of ``NAME`` or ``NAME:DIFFICULTY`` (1 to 5; 1 where not given)."""
    bare, colon, level = name.strip().partition(":")
    if colon and not level.isdigit():
        raise UserError(f"task ({name}): the difficulty after the colon must be from 1 to 5")
    return get(bare, int(level or 1), seed)


def different(task: Task, count: int, split: Split = "train", known: Iterable[str] = ()) -> Iterator[Example]:
    """The first ``count`` different examples of a split, in a fixed order; fewer where there are no more.

    ``known``: ids that do not count as different.
    """
    seen = set(known)
    count += len(seen)
    index = vain = 0
    while len(seen) < count and vain < IN_VAIN:
        example = task.sample(index, split)
        index, vain = index + 1, vain + 1
        if example.id not in seen:
            seen.add(example.id)
            vain = 0
            yield example


def solved(
    task: Task, count: int, split: Split = "train", reasoning: bool = True
) -> Iterator[dict[str, Any]]:
    """Rows of ``prompt`` and ``completion`` beside the task's other columns: what `dsv3 sft` reads.

    ``reasoning``: with the steps before the answer, where steps are known. Raises :class:`UserError` for a
    task whose solutions nobody knows.
    """
    for example in different(task, count, split):
        solution = task.solve(example)
        if solution is None:
            raise UserError(f"task ({task.name}) has no solutions to learn from; `dsv3 tasks show` shows one")
        yield {**example.row(), "completion": solution.reasoned() if reasoning else solution.plain()}
