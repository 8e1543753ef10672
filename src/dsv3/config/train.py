"""Typed recipes of training: what all stages share, and pre-training (report 4.2)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dsv3.common.errors import UserError
from dsv3.config.fp8 import FP8Section
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelSection
from dsv3.config.recipe import Recipe


def _ratio(value: Any) -> Any:
    """Accept ``1/3`` beside plain numbers, so that a recipe can state the report's own figures exactly."""
    if isinstance(value, str) and value.count("/") == 1:
        above, below = value.split("/")
        try:
            return float(above) / float(below)
        except (ValueError, ZeroDivisionError):
            return value
    return value


Ratio = Annotated[float, BeforeValidator(_ratio)]


class Segment(Recipe):
    """One piece of a schedule: up to ``until``, go to the factor ``to``."""

    until: Ratio = Field(ge=0, description="where the piece ends, in schedule.measure's unit")
    to: Ratio = Field(ge=0, description="factor on the scheduled key, held (constant) or reached at the end")
    shape: Literal["constant", "linear", "cosine"] = Field("constant", description="how it gets there")


Segments = tuple[Segment, ...]


class ScheduleSection(Recipe):
    """Four schedules, each a factor on its key, as pure functions of the tokens seen."""

    measure: Literal["tokens", "share"] = Field(
        "share", description="unit of until: tokens, or share of the run"
    )
    learning_rate: Segments = Field((Segment(until=1, to=1),), description="factors on optimizer.lr")
    batch: Segments = Field((Segment(until=1, to=1),), description="factors on batch.sequences")
    gamma: Segments = Field((Segment(until=1, to=1),), description="factors on balance.gamma")
    mtp: Segments = Field((Segment(until=1, to=1),), description="factors on mtp.weight")


class DataSection(Recipe):
    """Prepared token shards."""

    path: str = Field("data/tiny", description="folder written by `dsv3 data prepare`")
    mask_documents: bool = Field(
        False, description="attend within documents only (the report packs without masks)"
    )
    long_share: float = Field(
        0.0, ge=0, le=1,
        description="share of samples that lie inside one document, where there are such long ones; the rest"
        " are packed",
    )  # fmt: skip
    tokenizer_sha256: str | None = Field(
        None, description="SHA-256 of the folder's tokenizer.json, checked before the start; null: any"
    )
    tokens_sha256: str | None = Field(
        None,
        description="SHA-256 of all its tokens (`cat train/*/*.bin valid/*/*.bin`), checked before the start;"
        " null: any",
    )


class BatchSection(Recipe):
    """Sequences a step."""

    sequences: int = Field(16, gt=0, description="sequences an optimizer step, at the schedule's factor 1")
    micro_sequences: int = Field(16, gt=0, description="sequences a forward and backward pass")


class OptimizerSection(Recipe):
    """AdamW (report 4.2)."""

    lr: float = Field(2.2e-4, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay, not on norms and biases")
    clip: float = Field(1.0, gt=0, description="greatest global norm of the gradient")
    moments: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="dtype of the moments; auto: bf16 with precision fp8 (report 3.3.3), else fp32"
    )

    def moments_in(self, precision: str) -> Literal["fp32", "bf16"]:
        """The dtype of the moments in a run of this precision: ``auto`` resolved."""
        if self.moments == "auto":
            return "bf16" if precision == "fp8" else "fp32"
        return self.moments


class BalanceSection(Recipe):
    """Balancing without an auxiliary loss (report 2.1.2); its weight alpha is model.aux_loss_alpha."""

    gamma: float = Field(0.001, ge=0, description="step of the experts' biases after each optimizer step")


class MTPSection(Recipe):
    """Multi-token prediction (report 2.2)."""

    weight: float = Field(0.3, ge=0, description="lambda, the weight of the MTP loss")


class CheckpointSection(Recipe):
    """When to save and what to keep."""

    every: int = Field(200, gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="newest checkpoints kept")


class ValidationSection(Recipe):
    """Held-out text."""

    every: int = Field(200, gt=0, description="steps between validations")
    sequences: int = Field(32, gt=0, description="held-out sequences read each time")
    target: float | None = Field(
        None,
        gt=0,
        description="held-out loss, nats a token (log-perplexity), that ends the run when it is reached;"
        " null: the run goes to its end",
    )


class SamplesSection(Recipe):
    """Text written while training."""

    every: int = Field(400, gt=0, description="steps between samples")
    prompts: tuple[str, ...] = Field(("def ", "In the beginning"), description="texts to continue")
    tokens: int = Field(48, gt=0, description="tokens a sample")
    temperature: float = Field(0.7, ge=0, description="0: the likeliest token each time")


class EMASection(Recipe):
    """Moving average of the weights, kept in CPU memory and updated beside the training (report 5)."""

    decay: float = Field(0.0, ge=0, lt=1, description="decay a step; 0: no average is kept")


class LogSection(Recipe):
    """What is written down."""

    every: int = Field(1, gt=0, description="steps between lines of metrics.jsonl")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "mlperf"] = Field(
        "none",
        description="also send metrics there (pip install 'dsv3[track]'); mlperf: a log by MLPerf's rules in"
        " OUT/mlperf.log, pre-training only (pip install 'dsv3[mlperf]')",
    )


class MLPerfSection(Recipe):
    """What a log by MLPerf's rules says of whose run it is, with ``log.report_to: mlperf``."""

    benchmark: str = Field("dsv3", min_length=1, description="submission_benchmark, e.g. deepseekv3_671b")
    division: Literal["open", "closed"] = Field("open", description="submission_division")
    status: Literal["onprem", "cloud", "research"] = Field("research", description="submission_status")
    organisation: str = Field("unnamed", min_length=1, description="submission_org")
    platform: str = Field("unnamed", min_length=1, description="submission_platform: the hardware's name")


class TrainRecipe(Recipe):
    """What every training stage needs to know; each stage adds its own."""

    stage: ClassVar[str] = "train"  # the verb of the command line

    out: str = Field("runs/train", description="run folder")
    seed: int = Field(0, ge=0, description="of the initial weights and the order of the data")
    start: str | None = Field(
        None, description="Hugging Face folder to begin from; its config.json gives the model's other fields"
    )
    model: ModelConfig = Field(description="the model")
    sequence_length: int = Field(256, gt=1, description="tokens a sequence")
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32",
        description="of activations and products; fp8: products as in report 3.3, the rest bf16 (CPU: fp32)",
    )
    fp8: FP8Section = Field(FP8Section(), description="FP8 training, with precision fp8")
    device: str = Field("auto", description="cpu, cuda, or auto: cuda where there is one")
    compile: bool = Field(False, description="torch.compile each layer: a minute at the start, then faster")
    recompute: Literal["none", "report", "layer"] = Field(
        "none",
        description="what the backward makes again: nothing; RMSNorm and MLA up-projections (report 5); all",
    )
    parallel: ParallelSection = Field(ParallelSection(), description="processes, launched by torchrun")
    batch: BatchSection = Field(BatchSection(), description="batch")
    optimizer: OptimizerSection = Field(OptimizerSection(), description="optimizer")
    schedule: ScheduleSection = Field(ScheduleSection(), description="schedules")
    balance: BalanceSection = Field(BalanceSection(), description="balancing")
    mtp: MTPSection = Field(MTPSection(), description="multi-token prediction")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="checkpoints")
    ema: EMASection = Field(EMASection(), description="moving average")
    log: LogSection = Field(LogSection(), description="logging")
    max_skipped: int = Field(10, gt=0, description="steps in a row with a non-finite loss before giving up")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """With ``start``, the model is that folder's; keys of ``model`` change its fields."""
        start, changed = tree.get("start"), tree.get("model") or {}
        if not isinstance(start, str) or not isinstance(changed, dict) or "preset" in changed:
            return tree
        return {**tree, "model": {**ModelConfig.from_pretrained(start).model_dump(), **changed}}

    def _length(self) -> float:
        """Where schedules end, in the unit of ``schedule.measure``."""
        if self.schedule.measure == "tokens":
            raise ValueError(
                f"schedule.measure (tokens): the tokens of a {self.stage} run are not known beforehand; "
                "use share"
            )
        return 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        end = self._length()
        if self.log.report_to == "mlperf" and "mlperf" not in type(self).model_fields:
            raise ValueError(f"log.report_to (mlperf) is for pre-training, not for {self.stage}; use none")
        for name in ("learning_rate", "batch", "gamma", "mtp"):
            segments: Segments = getattr(self.schedule, name)
            if not segments:
                raise ValueError(f"schedule.{name} is empty; give at least one piece")
            ends = [piece.until for piece in segments]
            if ends != sorted(ends):
                raise ValueError(f"schedule.{name}: until must not fall, but reads {ends}")
            if ends[-1] < end * (1 - 1e-9):
                raise ValueError(
                    f"schedule.{name} ends at {ends[-1]:g} {self.schedule.measure}, before the run's end "
                    f"({end:g}); lengthen its last piece"
                )
        if self.batch.sequences % self.batch.micro_sequences:
            raise ValueError(
                f"batch.micro_sequences ({self.batch.micro_sequences}) must divide batch.sequences "
                f"({self.batch.sequences})"
            )
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) exceeds model.max_position_embeddings "
                f"({self.model.max_position_embeddings}); raise the latter"
            )
        return self


class PretrainRecipe(TrainRecipe):
    """Everything a pre-training run needs to know."""

    stage: ClassVar[str] = "pretrain"

    out: str = Field("runs/pretrain", description="run folder")
    data: DataSection = Field(DataSection(), description="the data")
    total_tokens: int = Field(gt=0, le=10**15, description="tokens to train on")
    validation: ValidationSection = Field(ValidationSection(), description="validation")
    samples: SamplesSection = Field(SamplesSection(), description="samples")
    mlperf: MLPerfSection = Field(MLPerfSection(), description="the log by MLPerf's rules")

    @model_validator(mode="before")
    @classmethod
    def _whole_tokens(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("total_tokens"), float):  # 3e6 is read as a float
            return {**tree, "total_tokens": int(tree["total_tokens"])}
        return tree

    def _length(self) -> float:
        return 1.0 if self.schedule.measure == "share" else float(self.total_tokens)


def check_vocabulary(config: ModelConfig, tokenizer_size: int) -> None:
    """Refuse a model whose embedding does not cover the tokenizer."""
    if config.vocab_size < tokenizer_size:
        raise UserError(
            f"model.vocab_size ({config.vocab_size}) is below the tokenizer's {tokenizer_size} tokens; "
            f"set --model.vocab_size {-(-tokenizer_size // 64) * 64}"
        )
