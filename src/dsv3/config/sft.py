"""Typed recipe of supervised fine-tuning (report 5.1)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dsv3.config.distill import TeacherSection
from dsv3.config.recipe import Recipe
from dsv3.config.train import (
    BalanceSection,
    MTPSection,
    OptimizerSection,
    SamplesSection,
    ScheduleSection,
    Segment,
    TrainRecipe,
    ValidationSection,
)


def _listed(value: Any) -> Any:
    """One path is a list of one."""
    return (value,) if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class ExamplesSection(Recipe):
    """Datasets of messages, of prompt and completion, or of text."""

    train: Paths = Field(
        min_length=1,
        description="files of JSON lines or parquet, folders of them, or folders written by Hugging Face"
        " datasets",
    )
    valid: Paths = Field((), description="the same, held out; empty: valid_fraction of train is")
    valid_fraction: float = Field(
        0.02, gt=0, lt=1, description="share of train's examples held out, chosen by their content"
    )
    keep_think: bool = Field(
        True, description="keep the answers' reasoning, which the released chat template drops"
    )
    long: Literal["cut", "drop", "refuse"] = Field(
        "cut", description="what becomes of an example of more than sequence_length tokens"
    )


class SFTRecipe(TrainRecipe):
    """Everything a fine-tuning run needs to know."""

    stage: ClassVar[str] = "sft"

    out: str = Field("runs/sft", description="run folder")
    start: str | None = Field(description="Hugging Face folder to begin from, with its tokenizer")
    data: ExamplesSection = Field(description="the examples")
    epochs: int = Field(2, gt=0, description="times every example is seen (the report: 2)")
    sequence_length: int = Field(2048, gt=1, description="tokens a sequence: some whole examples and padding")
    optimizer: OptimizerSection = Field(OptimizerSection(lr=5e-6), description="optimizer")
    schedule: ScheduleSection = Field(
        ScheduleSection(
            learning_rate=(Segment(until=0, to=1), Segment(until=1, to=0.2, shape="cosine")),
        ),
        description="schedules; the learning rate falls from 5e-6 to 1e-6 by a cosine (report 5.1)",
    )
    balance: BalanceSection = Field(BalanceSection(gamma=0.0), description="balancing")
    mtp: MTPSection = Field(MTPSection(weight=0.1), description="multi-token prediction")
    teacher: TeacherSection = Field(TeacherSection(), description="distillation by logits")
    validation: ValidationSection = Field(ValidationSection(every=50), description="validation")
    samples: SamplesSection = Field(
        SamplesSection(prompts=("Hello!",), tokens=128), description="questions answered while training"
    )
