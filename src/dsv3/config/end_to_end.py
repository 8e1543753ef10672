"""Typed recipe of `dsv3 bench end-to-end`: every stage of a model's life, one after the other, by seeds."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from pydantic import Field

from dsv3.config import recipe as recipes
from dsv3.config.recipe import Recipe

R = TypeVar("R", bound=Recipe)


class StageSection(Recipe):
    """A stage: the recipe of its own verb, and what is changed in it."""

    recipe: str = Field(description="YAML recipe of the stage's verb")
    changes: dict[str, Any] = Field({}, description="its keys, dotted, with the values to use instead")

    def load(self, kind: type[R], **given: Any) -> R:
        """The stage's recipe with ``changes``, then ``given`` (``__`` for the dot)."""
        changes = self.changes | {name.replace("__", "."): value for name, value in given.items()}
        return recipes.load(kind, self.recipe, [f"--{key}={json.dumps(v)}" for key, v in changes.items()])


class EndToEndRecipe(Recipe):
    """Everything `dsv3 bench end-to-end` needs to know."""

    out: str = Field("runs/pipeline", description="folder to write")
    seeds: list[int] = Field(
        [0, 1, 2], min_length=1, description="of all that follows pre-training; more can be added later"
    )
    tasks: list[str] = Field(min_length=1, description="what is taught and asked: NAME or NAME:DIFFICULTY")
    examples: int = Field(100, gt=0, description="solved examples a task in the first fine-tuning")
    prompts: int = Field(200, gt=0, description="prompts a task in the distillation")
    questions: int = Field(200, gt=0, description="held-out questions a task after every stage, at most")
    max_tokens: int = Field(32, gt=0, description="tokens of an answer to one of them")
    data: StageSection = Field(description="text, and the tokenizer trained on it")
    pretrain: StageSection = Field(description="pre-training, once for all seeds")
    sft: StageSection = Field(description="fine-tuning on the solved examples")
    distill: StageSection = Field(description="the fine-tuned model answers, the verifiers keep")
    again: StageSection = Field(description="fine-tuning on the examples and what was kept")
    grpo: StageSection = Field(description="reinforcement learning")
    quantize: list[Literal["fp8", "int8", "int4"]] = Field(
        ["int8", "int4"],
        min_length=1,
        description="formats of the first seed's last model; it serves the last",
    )
    notes: list[str] = Field([], description="sentences for the page, about what its figures do not say")
