"""Typed recipe of a reward model with a scalar head (report 5.2)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dsv3.config.recipe import Recipe
from dsv3.config.train import (
    BalanceSection,
    BatchSection,
    MTPSection,
    OptimizerSection,
    ScheduleSection,
    Segment,
    TrainRecipe,
)


class PairsSection(Recipe):
    """Preferences: rows of prompt, chosen and rejected, texts or lists of messages."""

    train: tuple[str, ...] = Field(
        min_length=1, description="files (.jsonl, .parquet) or folders of pairs; what `dsv3 distill` writes"
    )
    held_out: float = Field(
        0.1, gt=0, lt=1, description="share of the prompts that only measure, chosen by their hash"
    )


class RewardValidation(Recipe):
    """Held-out pairs."""

    every: int = Field(50, gt=0, description="steps between measurements of accuracy on held-out pairs")


class RewardRecipe(TrainRecipe):
    """Everything `dsv3 reward` needs to know. ``batch`` counts pairs."""

    stage: ClassVar[str] = "reward"

    out: str = Field("runs/reward", description="run folder")
    start: str | None = Field(description="Hugging Face folder to begin from (the SFT model), with tokenizer")
    data: PairsSection = Field(description="the pairs")
    epochs: int = Field(1, gt=0, description="times every pair is seen; reward models overfit soon")
    sequence_length: int = Field(1024, gt=1, description="tokens a conversation; longer pairs are left out")
    batch: BatchSection = Field(BatchSection(), description="batch, in pairs")
    optimizer: OptimizerSection = Field(OptimizerSection(lr=1e-5, weight_decay=0.0), description="optimizer")
    schedule: ScheduleSection = Field(
        ScheduleSection(
            learning_rate=(
                Segment(until=0.05, to=1, shape="linear"),
                Segment(until=1, to=0.1, shape="cosine"),
            )
        ),
        description="schedules, over the pairs seen",
    )
    balance: BalanceSection = Field(BalanceSection(gamma=0.0), description="balancing")
    mtp: MTPSection = Field(MTPSection(weight=0.0), description="multi-token prediction: not trained here")
    validation: RewardValidation = Field(RewardValidation(), description="validation")
