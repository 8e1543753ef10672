"""Several reward functions as one: weights, None for not applicable, and what to do when one crashes."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsv3.common.errors import Failure, UserError
from dsv3.evaluate.rewards.functions import RewardFunction


@dataclass(frozen=True)
class Scores:
    """``total[i]``: the weighted sum over the functions that apply to completion i; None where none does.

    ``by_function[name][i]``: each function's own score. ``crashes``: one line for each that was passed over.
    """

    total: list[float | None]
    by_function: dict[str, list[float | None]]
    crashes: list[str]


class Rewards:
    """Reward functions with their weights, called as one.

    Functions may be plain or ``async``. ``on_crash`` "stop" raises :class:`Failure`, "skip" counts the
    sample as not applicable and goes on; both name the function, the sample and the line. To find the sample,
    a function that crashed on a batch is called again, one completion at a time.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction] | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        on_crash: Literal["stop", "skip"] = "stop",
    ):
        if not isinstance(functions, Mapping):
            given = [getattr(function, "__name__", type(function).__name__) for function in functions]
            twice = {name for name in given if given.count(name) > 1}
            if twice:
                raise UserError(
                    f"reward functions ({', '.join(sorted(twice))}) share a name; name them in a dict"
                )
            functions = dict(zip(given, functions))
        if not functions:
            raise UserError("reward_funcs is empty; name at least one function")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
            raise UserError(
                f"reward_weights ({weights}) must be {len(functions)} finite numbers, one for each of"
                f" {', '.join(functions)}"
            )
        if on_crash not in ("stop", "skip"):
            raise UserError(f"on_crash ({on_crash}) must be stop or skip")
        self.functions = dict(functions)
        self.weights = dict(zip(self.functions, weights))
        self.on_crash = on_crash

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Scores:
        """Score a batch. Columns that are lists as long as the batch belong to its rows, others to all."""
        by_function: dict[str, list[float | None]] = {}
        crashes: list[str] = []
        for name in self.functions:
            try:
                by_function[name] = self._batch(name, prompts, completions, columns)
            except Exception as error:
                by_function[name] = self._singly(name, prompts, completions, columns, crashes, error)
        total = [
            self._sum([by_function[name][at] for name in self.functions]) for at in range(len(completions))
        ]
        return Scores(total, by_function, crashes)

    def _sum(self, scores: list[float | None]) -> float | None:
        weighed = [w * s for w, s in zip(self.weights.values(), scores) if s is not None]
        return sum(weighed) if weighed else None

    def _batch(
        self, name: str, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> list[float | None]:
        result = self.functions[name](prompts=list(prompts), completions=list(completions), **columns)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        if not isinstance(result, (list, tuple)) and hasattr(result, "tolist"):
            result = result.tolist()
        if not isinstance(result, (list, tuple)) or len(result) != len(completions):
            raise TypeError(f"it must return a list of {len(completions)} rewards, not {_short(result)}")
        scores: list[float | None] = []
        for value in result:
            number = None if value is None else float(value)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"a reward must be finite or None, not {number}")
            scores.append(number)
        return scores

    def _singly(
        self,
        name: str,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: dict[str, Any],
        crashes: list[str],
        first: Exception,
    ) -> list[float | None]:
        """The batch once more, a completion at a time."""
        size = len(completions)
        scores: list[float | None] = []
        before = len(crashes)
        for at in range(size):
            own = {
                key: [value[at]] if isinstance(value, (list, tuple)) and len(value) == size else value
                for key, value in columns.items()
            }
            try:
                scores += self._batch(name, [prompts[at]], [completions[at]], own)
            except Exception as error:
                identifier = own.get("id", [at])
                label = identifier[0] if isinstance(identifier, list) else at
                line = (
                    f"reward function {name} failed on sample {label} ({_short(completions[at])}):"
                    f" {_said(error)}"
                )
                if self.on_crash == "stop":
                    raise Failure(f"{line}; set on_crash to skip to go on without such samples") from error
                print(f"dsv3: {line}; passed over", file=sys.stderr, flush=True)
                crashes.append(line)
                scores.append(None)
        if len(crashes) == before:  # it fails on batches only
            line = f"reward function {name} failed on a batch of {size}: {_said(first)}"
            if self.on_crash == "stop":
                raise Failure(line) from first
            print(f"dsv3: {line}; its samples were scored one at a time", file=sys.stderr, flush=True)
            crashes.append(line)
        return scores


async def _awaited(value: Any) -> Any:
    return await value


def _said(error: Exception) -> str:
    """The exception with the file and line it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
