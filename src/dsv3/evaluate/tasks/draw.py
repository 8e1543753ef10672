"""Different examples of a task, and rows of a dataset made of them and their solutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv3.common.errors import UserError
from dsv3.evaluate.tasks.base import Example, Split, Task

IN_VAIN = 1000  # draws in a row that bring nothing new, before a task is held to have no more


def different(task: Task, count: int, split: Split = "train") -> Iterator[Example]:
    """The first ``count`` different examples of a split, in a fixed order; fewer where there are no more."""
    seen: set[str] = set()
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
