"""Prompts of a run: examples of verifiable tasks and rows of files, as a pure function of a serial number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3.common.errors import UserError
from dsv3.config.grpo import GRPORecipe
from dsv3.data import chat, rows
from dsv3.data.permutation import combine, period_table, permute
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluate import tasks


@dataclass(frozen=True)
class Prompt:
    """``columns``: the row as reward functions get it, ``prompt`` among them: a text, or messages."""

    serial: int
    ids: list[int]
    columns: dict[str, Any]

    @property
    def text(self) -> str:
        """The last thing said."""
        prompt = self.columns["prompt"]
        return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])

    def completion(self, text: str) -> Any:
        """An answer in the prompt's form: a text, or messages (TRL's convention)."""
        if isinstance(self.columns["prompt"], str):
            return text
        return [{"role": "assistant", "content": text}]


class Prompts:
    """``prompts(serial)``: the sources mixed by their weights; a file's rows are shuffled anew every epoch.

    ``longest``: tokens a prompt may have. Raises :class:`UserError` naming a row without a prompt, or one
    that is too long, before any work.
    """

    def __init__(self, recipe: GRPORecipe, tokenizer: Tokenizer, longest: int):
        self.tokenizer, self.system, self.longest = tokenizer, recipe.system, longest
        self.seed = recipe.seed
        self.tasks = [tasks.get(task.name, task.difficulty, recipe.seed) for task in recipe.tasks]
        self.rows = list(rows.read(recipe.prompts.paths))
        weights = [task.weight for task in recipe.tasks] + ([recipe.prompts.weight] if self.rows else [])
        if recipe.prompts.paths and not self.rows:
            raise UserError(f"prompts.paths ({', '.join(recipe.prompts.paths)}) hold no rows")
        for row in self.rows:
            if not isinstance(row.fields.get("prompt"), str | list) or not row.fields["prompt"]:
                raise UserError(f"{row.where} needs a column prompt, a text or a list of messages")
            try:
                self.encode(row.fields)
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from None
        self._table = period_table(weights, recipe.seed)
        self._before = np.zeros_like(self._table)
        self._share = np.bincount(self._table, minlength=len(weights))
        for source, count in enumerate(self._share):
            self._before[self._table == source] = np.arange(count)

    def __call__(self, serial: int) -> Prompt:
        """The prompt of a number."""
        period, place = divmod(serial, len(self._table))
        source = int(self._table[place])
        within = period * int(self._share[source]) + int(self._before[place])
        if source < len(self.tasks):
            return self.of(self.tasks[source].sample(within).row(), serial)
        epoch, at = divmod(within, len(self.rows))
        chosen = permute(np.array([at]), len(self.rows), combine(self.seed, epoch))
        return self.of(self.rows[int(chosen[0])].fields, serial)

    def of(self, columns: dict[str, Any], serial: int) -> Prompt:
        """A row as a prompt."""
        return Prompt(serial, self.encode(columns), columns)

    def encode(self, columns: dict[str, Any]) -> list[int]:
        """Token ids up to where the assistant begins; a text is what the user says, after ``system``."""
        prompt = columns["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
            if self.system is not None:
                prompt = [{"role": "system", "content": self.system}, *prompt]
        ids, _ = chat.encode(self.tokenizer, prompt, add_generation_prompt=True)
        if len(ids) > self.longest:
            raise UserError(
                f"the prompt has {len(ids)} tokens, and sequence_length less rollouts.max_tokens leaves"
                f" {self.longest}: raise --sequence_length, or leave it out"
            )
        return ids


def columns_of(prompts: list[Prompt], answers: int) -> dict[str, list[Any]]:
    """Every column of any of the rows, each row ``answers`` times over; None where a row has none."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {
        name: [prompt.columns.get(name) for prompt in prompts for _ in range(answers)]
        for name in names
        if name != "prompt"
    }
