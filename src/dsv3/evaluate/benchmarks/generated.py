"""The verifiable tasks of :mod:`dsv3.evaluate.tasks` as benchmarks: examples of the test split, which no
training draws from, asked as a conversation or, of a model that knows none, after worked examples."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.common.errors import UserError
from dsv3.evaluate.benchmarks.base import Benchmark, Question, Scores
from dsv3.evaluate.tasks import Example, Split, Task
from dsv3.evaluate.tasks.draw import different, named

SAMPLES = 200
SHOTS = 4


def generated(
    name: str,
    samples: int = SAMPLES,
    *,
    chat: bool = True,
    max_tokens: int = 512,
    split: Split = "test",
    seed: int = 0,
) -> Benchmark:
    """Up to ``samples`` different examples of ``NAME`` or ``NAME:DIFFICULTY`` (1 to 5; 1 where not given).

    There are fewer where the task has fewer. Raises :class:`UserError` for a name or difficulty unknown.
    """
    task = named(name, seed)
    examples = list(different(task, samples, split))
    head = "" if chat else _head(task)
    questions = [
        Question(
            example.id,
            [{"role": "user", "content": example.prompt}] if chat else head + _ask(example.prompt),
            reference=example.row(),
            own=example.prompt,
        )
        for example in examples
    ]

    def judge(asked: Sequence[Question], answers: Sequence[str]) -> list[Scores]:
        return [
            {"accuracy": task.verify(answer, Example(**question.reference))}
            for question, answer in zip(asked, answers)
        ]

    return Benchmark(
        name, "accuracy", questions, judge,
        shots=0 if chat else SHOTS,
        max_tokens=max_tokens,
        stop=() if chat else ("\n\nQuestion:",),
        note=f"{split} split, {'a conversation' if chat else 'plain text'}",
    )  # fmt: skip


def _ask(prompt: str) -> str:
    return f"Question: {prompt}\nAnswer:"


def _head(task: Task) -> str:
    """Worked examples of the training split."""
    shots: list[str] = []
    for example in different(task, 20 * SHOTS):  # some have no solution
        solution = task.solve(example)
        if solution is not None and len(shots) < SHOTS:
            steps = f"{solution.reasoning}\n" if solution.reasoning else ""
            shots.append(f"{_ask(example.prompt)} {steps}{solution.plain()}\n\n")
    if len(shots) < SHOTS:
        raise UserError(f"{task.name} has no worked solutions to show; ask it with --chat")
    return "".join(shots)
