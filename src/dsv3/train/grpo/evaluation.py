"""Held-out accuracy while training: greedy answers to examples no training run ever sees."""

from __future__ import annotations

from dataclasses import replace

from dsv3.config.grpo import GRPORecipe
from dsv3.evaluate import tasks
from dsv3.serve.params import SamplingParams
from dsv3.train.grpo.prompts import Prompts
from dsv3.train.grpo.rollouts import Rollouts
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Callback, StepReport, Trainer


class HeldOutTasks(Callback):
    """``accuracy/TASK``, mean scores: at the start, every ``evaluation.every`` steps and at the end."""

    def __init__(self, run: RunFolder, recipe: GRPORecipe, prompts: Prompts, rollouts: Rollouts):
        self.run, self.rollouts, self.every = run, rollouts, recipe.evaluation.every
        self.params = SamplingParams(max_tokens=recipe.rollouts.max_tokens, temperature=0)
        self.examples = {
            f"{section.name}-{section.difficulty}": (
                task, [task.sample(number, "validation") for number in range(recipe.evaluation.examples)]
            )
            for section, task in zip(recipe.tasks, prompts.tasks)
        }  # fmt: skip
        self.prompts = {
            name: [prompts.of(example.row(), 0).ids for example in examples]
            for name, (_, examples) in self.examples.items()
        }
        self.measured = -1

    def measure(self, trainer: Trainer) -> None:
        """Answer all examples; a line of metrics and one for people."""
        if trainer.state.step == self.measured:
            return
        self.measured = trainer.state.step
        found: dict[str, float] = {}
        for name, (task, examples) in self.examples.items():
            answers = self.rollouts.generate(
                self.prompts[name], replace(self.params, n=1), [0] * len(examples), 0
            )
            found[f"accuracy/{name}"] = _mean(task, examples, [answer.text for (answer,) in answers])
        record = {"step": trainer.state.step, "tokens": trainer.state.tokens, **found}
        self.run.metric(record)
        said = ", ".join(f"{name.partition('/')[2]} {100 * value:.1f}%" for name, value in found.items())
        self.run.log(f"step {trainer.state.step}: held-out {said}")

    def on_start(self, trainer: Trainer) -> None:
        """Where the run begins."""
        if trainer.state.step == 0:
            self.measure(trainer)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Now and then."""
        if trainer.state.step % self.every == 0:
            self.measure(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Where it ends."""
        self.measure(trainer)


def _mean(task: tasks.Task, examples: list[tasks.Example], texts: list[str]) -> float:
    return sum(task.verify(text, example) for text, example in zip(texts, examples)) / len(examples)
