"""Typed recipe of the context extension (report 4.3): phases, each a pre-training run of its own."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from dsv3.common.errors import UserError
from dsv3.config.recipe import Recipe, validate
from dsv3.config.train import PretrainRecipe


class Phase(PretrainRecipe):
    """A pre-training run at one length; ``steps`` of ``batch.sequences`` give ``total_tokens``."""

    stage: ClassVar[str] = "extend"

    steps: int = Field(gt=0, description="optimizer steps (report 4.3: 1,000)")
    total_tokens: int = Field(0, description="follows from steps, batch.sequences and sequence_length")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """As it is: a phase's model is whole, and ``start`` may not have been written yet."""
        return tree

    @model_validator(mode="before")
    @classmethod
    def _count(cls, tree: Any) -> Any:
        """Tokens of the phase, where the keys they follow from are given and sound."""
        batch = tree.get("batch") if isinstance(tree, dict) else None
        parts = (
            [tree.get("steps"), tree.get("sequence_length"), batch.get("sequences")]
            if isinstance(batch, dict)
            else []
        )
        if len(parts) == 3 and all(isinstance(part, int) for part in parts):
            return {**tree, "total_tokens": parts[0] * parts[1] * parts[2]}
        return tree

    @model_validator(mode="after")
    def _whole(self) -> Phase:
        if self.total_tokens != self.steps * self.batch.sequences * self.sequence_length:
            raise ValueError("steps, sequence_length and batch.sequences are required in a phase")
        if any(piece.to != 1 for piece in self.schedule.batch):
            raise ValueError("schedule.batch: a phase has one batch size, batch.sequences; leave it out")
        return self


class ExtendRecipe(Recipe):
    """The phases in their order. Keys beside ``phases`` are those of all of them; a phase changes some."""

    shorthand: ClassVar[dict[str, str]] = {
        "start": "Hugging Face folder of the model to extend",
        "model": "fields that change with the extension: rope_scaling and max_position_embeddings",
        "...": "any other key of dsv3 pretrain: it holds for each phase that does not set it",
    }

    out: str = Field("runs/extend", description="run folder: phase-1, phase-2, ... are made in it")
    phases: list[Phase] = Field(description="the phases, in the order they run", min_length=1)

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Every phase with all its keys: the common ones, its own, where it starts and where it writes."""
        phases = tree.get("phases")
        if phases is None:
            raise UserError("phases is required: a list, each entry the keys that this phase changes")
        if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
            raise UserError(f"phases ({phases}) must be a list, each entry the keys that this phase changes")
        out = str(tree.get("out", cls.model_fields["out"].default))
        common = {key: value for key, value in tree.items() if key not in ("out", "phases")}
        whole: list[dict[str, Any]] = []
        for number, changes in enumerate(phases, start=1):
            phase = {**common, **changes}
            for key, value in changes.items():  # a section is changed key by key
                if isinstance(value, dict) and isinstance(common.get(key), dict):
                    phase[key] = {**common[key], **value}
            if not isinstance(phase.get("start"), str):
                raise UserError("start is required: the Hugging Face folder of the model to extend")
            if number == 1:
                phase = PretrainRecipe.expand(phase)
            else:  # what the phase before will have written
                phase["model"] = {**whole[-1]["model"], **phase.get("model", {})}
                phase["start"] = f"{whole[-1]['out']}/model"
            phase["out"] = f"{out}/phase-{number}"
            whole.append(phase)
        return {"out": out, "phases": [_phase(number, phase) for number, phase in enumerate(whole)]}

    @model_validator(mode="after")
    def _longer_and_longer(self) -> ExtendRecipe:
        lengths = [phase.sequence_length for phase in self.phases]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"phases: sequence_length must rise from phase to phase, but reads {lengths}")
        yarn = self.phases[0].model.rope_scaling
        if yarn is None:
            raise ValueError(
                "model.rope_scaling is required: the report's is {factor: 40}, with "
                "original_max_position_embeddings the length the model was trained at"
            )
        if lengths[0] <= yarn.original_max_position_embeddings:
            raise ValueError(
                f"phases.0.sequence_length ({lengths[0]}) must exceed model.rope_scaling."
                f"original_max_position_embeddings ({yarn.original_max_position_embeddings})"
            )
        return self


def _phase(number: int, tree: dict[str, Any]) -> Phase:
    try:
        return validate(Phase, tree)
    except UserError as error:
        raise UserError(f"phases.{number}: {error}") from None
