"""What the policy wrote and what it earned: every completion in ``samples.jsonl``, some in a table."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv3.config.grpo import ShownSection
from dsv3.train.grpo.prompts import Prompt
from dsv3.train.grpo.rollouts import Answer
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Trainer

WIDTH = 110  # columns of the table


@dataclass(frozen=True)
class Group:
    """A prompt, its answers and what they earned; nan: no reward applies. ``extra``: columns to write."""

    prompt: Prompt
    answers: list[Answer]
    rewards_G: Tensor
    scores: dict[str, list[float | None]]
    extra: dict[str, list[Any]]


class Completions:
    """Writes the completions of each batch of rollouts.

    ``log_extra`` and ``log_metric`` are what reward functions written for TRL may call: a column more for the
    completions at hand, and a number whose mean goes to the metrics.
    """

    def __init__(self, run: RunFolder, shown: ShownSection):
        self.run, self.shown = run, shown
        self.batches = 0
        self._extra: dict[str, list[Any]] = defaultdict(list)
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """A value a completion, in the order they were given to the reward function."""
        self._extra[column] += values

    def log_metric(self, name: str, value: float) -> None:
        """A number of this batch."""
        self._metrics[name].append(float(value))

    def take_extra(self, count: int) -> dict[str, list[Any]]:
        """Columns given since they were last taken, those with a value for each of ``count`` completions."""
        whole = {
            name: list(map(_plain, values)) for name, values in self._extra.items() if len(values) == count
        }
        self._extra.clear()
        return whole

    def take_logged(self) -> dict[str, list[float]]:
        """Numbers logged since they were last taken."""
        logged = dict(self._metrics)
        self._metrics.clear()
        return logged

    def take_metrics(self) -> dict[str, float]:
        """Means of what reward functions logged since they were last taken."""
        return {name: sum(values) / len(values) for name, values in self.take_logged().items()}

    def write(self, trainer: Trainer, groups: Sequence[Group], advantages_PG: Tensor) -> None:
        """A line a completion, under the number of the step about to be made."""
        step = trainer.state.step + 1
        lines: list[dict[str, Any]] = [
            {
                "step": step,
                "serial": group.prompt.serial,
                "prompt": group.prompt.columns["prompt"],
                "completion": answer.text,
                "tokens": len(answer.tokens),
                "whole": answer.whole,
                "rewards": {name: scores[number] for name, scores in group.scores.items()},
                "advantage": round(advantage, 4),
                **(
                    {"extra": {name: column[number] for name, column in group.extra.items()}}
                    if group.extra
                    else {}
                ),
            }
            for group, advantages in zip(groups, advantages_PG.tolist())
            for number, (answer, advantage) in enumerate(zip(group.answers, advantages))
        ]
        for line in lines:
            self.run.sample(line)
        if self.shown.rows and self.batches % self.shown.every == 0:
            self.run.log(f"completions of step {step}, all of them in samples.jsonl\n{self._table(lines)}")
        self.batches += 1

    def _table(self, lines: Sequence[dict[str, Any]]) -> str:
        """Completions from all over the batch."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=True, expand=True)
        for name in ("prompt", "completion", *lines[0]["rewards"], "advantage"):
            table.add_column(name, justify="left" if name in ("prompt", "completion") else "right")
        apart = max(1, len(lines) // self.shown.rows)
        for line in lines[::apart][: self.shown.rows]:
            prompt = line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"]
            rewards = ["-" if value is None else f"{value:.2f}" for value in line["rewards"].values()]
            table.add_row(
                Text(_short(prompt)), Text(_short(line["completion"])), *rewards, f"{line['advantage']:.2f}"
            )
        page = io.StringIO()
        Console(file=page, width=WIDTH).print(table)
        return page.getvalue().rstrip()


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _short(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
