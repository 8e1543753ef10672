"""Scoring functions written for verl, used as reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dsv3.evaluate.rewards.functions import RewardFunction, text_of


def from_verl(compute_score: Callable[..., Any]) -> RewardFunction:
    """``compute_score(data_source, solution_str, ground_truth, extra_info)`` with TRL's signature.

    The ground truth is the column ``ground_truth``, or ``reward_model["ground_truth"]`` as in verl's files;
    ``data_source`` and ``extra_info`` are columns too, and may be absent. A result may be a number or a dict
    with ``score``; None stays None. Rows without ground truth get None.
    """

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        data_source: Sequence[Any] | None = None,
        ground_truth: Sequence[Any] | None = None,
        reward_model: Sequence[Any] | None = None,
        extra_info: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if ground_truth is None:
            ground_truth = [
                (row or {}).get("ground_truth") for row in reward_model or [None] * len(completions)
            ]
        scores: list[float | None] = []
        for at, completion in enumerate(completions):
            if ground_truth[at] is None:
                scores.append(None)
                continue
            result = compute_score(
                data_source=data_source[at] if data_source is not None else "",
                solution_str=text_of(completion),
                ground_truth=ground_truth[at],
                extra_info=extra_info[at] if extra_info is not None else None,
            )
            result = result["score"] if isinstance(result, dict) else result
            scores.append(None if result is None else float(result))
        return scores

    reward.__name__ = getattr(compute_score, "__name__", "compute_score")
    return reward
