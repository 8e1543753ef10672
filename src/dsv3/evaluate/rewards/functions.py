"""The rule-based rewards of report 5.2: the answer is right, the form is kept, the length is in bounds."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from dsv3.common.errors import UserError
from dsv3.evaluate import tasks
from dsv3.evaluate.verify import boxed, equal, outside_thought, quantity
from dsv3.evaluate.verify_symbolic import same_mathematics

RewardFunction = Callable[..., Any]  # (prompts, completions, **columns) -> list[float | None], or awaitable


def text_of(value: Any) -> str:
    """A prompt or completion as text: a string is itself, messages give the last one's content."""
    if isinstance(value, str):
        return value
    last = value[-1]
    return str(last.get("reasoning_content") or "") + str(last.get("content") or "")


@functools.lru_cache(maxsize=256)
def _task(name: str) -> tasks.Task:
    return tasks.get(name)


def task_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    task: Sequence[str | None] | None = None,
    answer: Sequence[str] = (),
    metadata: Sequence[dict[str, Any] | str] = (),
    **columns: Any,
) -> list[float | None]:
    """The score of each row's own verifier; None for rows that belong to no task of ours.

    Columns ``task``, ``answer``, ``metadata`` (and ``id``): what :meth:`Example.row` gives. ``metadata`` may
    be its JSON text: tables with typed columns would give every row the keys of all.
    """
    if task is None:
        return [None] * len(completions)
    scores: list[float | None] = []
    identifiers = columns.get("id") or [""] * len(completions)
    for at, name in enumerate(task):
        if name is None:
            scores.append(None)
            continue
        example = tasks.Example(
            identifiers[at], name, text_of(prompts[at]), answer[at], _loaded(metadata[at])
        )
        scores.append(_task(name).verify(text_of(completions[at]), example))
    return scores


def _loaded(metadata: Any) -> dict[str, Any]:
    return dict(json.loads(metadata) if isinstance(metadata, str) else metadata or {})


def boxed_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    solution: Sequence[str | None] | None = None,
    ground_truth: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 where the boxed answer states what the column ``solution`` (or ``ground_truth``) states, else 0.

    A solution with a box of its own counts by what is in it. math-verify is asked, where it is installed,
    about what is not equal by itself. None where the row has no solution.
    """
    wanted = solution if solution is not None else ground_truth
    if wanted is None:
        return [None] * len(completions)
    return [
        None if gold is None else _right(text_of(completion), str(gold))
        for completion, gold in zip(completions, wanted)
    ]


def _right(completion: str, gold: str) -> float:
    given = boxed(outside_thought(completion))
    if given is None:
        return 0.0
    inner = boxed(gold)
    gold = gold if inner is None else inner
    if equal(given, gold):
        return 1.0
    if quantity(given) is not None and quantity(gold) is not None:
        return 0.0  # two numbers, and not the same: nothing to ask the algebra about
    return float(bool(same_mathematics(given, gold)))


_FORM = re.compile(r"\s*<think>(.*)</think>(.*)", re.DOTALL)


def format_reward(
    prompts: Sequence[Any], completions: Sequence[Any], box: bool = True, **columns: Any
) -> list[float | None]:
    """1 for ``<think>`` thoughts ``</think>`` answer, each tag once, neither part empty; else 0.

    With ``box`` the answer has exactly one ``\\boxed{...}``. The opening tag may stand at the prompt's end.
    """
    scores: list[float | None] = []
    for prompt, completion in zip(prompts, completions):
        opened = text_of(prompt).rstrip().endswith("<think>")
        text = ("<think>" if opened else "") + text_of(completion)
        match = _FORM.fullmatch(text)
        good = (
            match is not None
            and text.count("<think>") == text.count("</think>") == 1
            and all(part.strip() for part in match.groups())
            and (not box or (match[2].count("\\boxed{") == 1 and bool(boxed(match[2]))))
        )
        scores.append(float(good))
    return scores


def soft_overlong(max_tokens: int, cache: int) -> RewardFunction:
    """DAPO's length penalty: 0 up to ``max_tokens - cache`` tokens, then falling to -1 at ``max_tokens``.

    Needs ``completion_ids``, which the trainer passes.
    """
    if not 0 < cache <= max_tokens:
        raise UserError(f"cache ({cache}) must be from 1 to max_tokens ({max_tokens})")

    def overlong_penalty(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]],
        **_: Any,
    ) -> list[float | None]:
        return [-min(1.0, max(0.0, (len(ids) - (max_tokens - cache)) / cache)) for ids in completion_ids]

    return overlong_penalty
