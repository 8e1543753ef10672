"""Held-out accuracy while training: greedy answers to examples no training run ever sees."""

from __future__ import annotations

from dataclasses import replace

from dsv3.config.grpo import GRPORecipe
from dsv3.serve.params import SamplingParams
from dsv3.train.callbacks.repeated import Repeated
from dsv3.train.grpo.prompts import Prompts
from dsv3.train.grpo.rollouts import Rollouts
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Trainer


class HeldOutTasks(Repeated):
    """``accuracy/TASK``, mean scores: at the start, every ``evaluation.every`` steps and at the end."""

    def __init__(self, run: RunFolder, recipe: GRPORecipe, prompts: Prompts, rollouts: Rollouts):
        super().__init__(recipe.evaluation.every, first=True)
        self.run, self.rollouts = run, rollouts
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

    def read(self, trainer: Trainer) -> None:
        """Answer all examples, each rank some of them; a line of metrics and one for people."""
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
