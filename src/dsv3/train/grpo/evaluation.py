"""Held-out accuracy while training: greedy answers to examples no training run ever sees."""

from __future__ import annotations

from dataclasses import replace

from dsv3.config.grpo import GRPORecipe
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
        """Answer all examples, each rank some of them; a line of metrics and one for people."""
        if trainer.state.step == self.measured:
            return
        self.measured = trainer.state.step
        found: dict[str, float] = {}
        world = trainer.world
        own = slice(world.data_rank, None, world.data_size)
        for name, (task, examples) in self.examples.items():
            prompts = self.prompts[name][own]
            answers = self.rollouts.generate(prompts, replace(self.params, n=1), [0] * len(prompts), 0)
            texts = [answer.text for (answer,) in answers]
            score = sum(task.verify(text, example) for text, example in zip(texts, examples[own]))
            found[f"accuracy/{name}"] = sum(row[0] for row in world.gather([score])) / len(examples)
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
