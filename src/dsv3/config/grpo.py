"""Typed recipe of reinforcement learning (report 5.2.2): GRPO, with the variants of the field as presets."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dsv3.common.errors import UserError, nearest
from dsv3.config.recipe import Recipe
from dsv3.config.train import BalanceSection, BatchSection, MTPSection, OptimizerSection, TrainRecipe

# What each paper says of the loss; what it says of sizes (answers a prompt, say) is in docs/grpo.md.
PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeek-V3, report 5.2.2: the ratio is of whole outputs; beta and epsilon are unpublished.
    "v3": {"ratio": "sequence", "average": "sequence", "scale": "group", "beta": 0.04},
    # DeepSeekMath (arXiv 2402.03300).
    "deepseekmath": {"ratio": "token", "average": "sequence", "scale": "group", "beta": 0.04},
    # DeepSeek-R1 (arXiv 2501.12948, and its journal version): practically no clipping, a small beta.
    "r1": {
        "ratio": "token", "average": "sequence", "scale": "group", "beta": 0.001,
        "epsilon_low": 10.0, "epsilon_high": 10.0,
    },
    # DAPO (arXiv 2503.14476): clip higher, every token counts the same, groups without signal drawn anew.
    "dapo": {
        "ratio": "token", "average": "token", "scale": "group", "beta": 0.0, "epsilon_high": 0.28, "redraw": 3
    },
    # Dr. GRPO (arXiv 2503.20783): neither the deviation nor the length divides.
    "dr_grpo": {"ratio": "token", "average": "constant", "scale": "none", "beta": 0.0},
    # GSPO (arXiv 2507.18071): a length-averaged ratio and a very narrow clip.
    "gspo": {
        "ratio": "sequence", "average": "sequence", "scale": "group", "beta": 0.0,
        "epsilon_low": 3e-4, "epsilon_high": 4e-4,
    },
}  # fmt: skip


class PolicySection(Recipe):
    """The loss. The defaults are those of the preset v3."""

    shorthand: ClassVar[dict[str, str]] = {
        "preset": f"one of {', '.join(PRESETS)}; the other keys change its values"
    }

    ratio: Literal["token", "sequence"] = Field(
        "sequence", description="probability ratio to the old policy: a token's, or the geometric mean of all"
    )
    average: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="over tokens, then sequences; over all tokens; sum over sequences x rollouts.max_tokens",
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="what divides reward - mean of the group: deviation of the group, the batch, 1"
    )
    epsilon_low: float = Field(0.2, ge=0, description="the ratio is clipped below 1 - epsilon_low")
    epsilon_high: float = Field(0.2, ge=0, description="the ratio is clipped above 1 + epsilon_high")
    beta: float = Field(0.04, ge=0, description="weight of the KL to start (k3); 0: no reference is held")
    unbiased_kl: bool = Field(False, description="multiply the KL by the ratio, as V3.2 does")
    off_policy: float | None = Field(
        None,
        ge=0,
        description="drop bad answers whose mean KL to the rollouts exceeds this (V3.2); null: keep all",
    )
    redraw: int = Field(0, ge=0, description="times groups of equal rewards are drawn anew (DAPO); 0: kept")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """``{"preset": "dapo", "beta": 0.01}``: the preset's values, then those given."""
        if "preset" not in tree:
            return tree
        name = tree["preset"]
        if name not in PRESETS:
            raise UserError(
                f"policy.preset ({name}) is unknown{nearest(str(name), PRESETS)};"
                f" there are {', '.join(PRESETS)}"
            )
        return {**PRESETS[name], **{key: value for key, value in tree.items() if key != "preset"}}


class RolloutSection(Recipe):
    """How answers are sampled, by the engine of ``dsv3 serve`` on the weights in training."""

    answers: int = Field(8, ge=2, description="answers a prompt: the group (G)")
    max_tokens: int = Field(64, gt=0, description="tokens an answer at most")
    temperature: float = Field(
        1.0, ge=0.01, le=10, description="of sampling, and of the loss's probabilities"
    )
    max_batch: int = Field(64, gt=0, description="answers written at once")
    draft_tokens: int = Field(1, ge=0, description="drafts a step by the MTP module; 0: none")
    minibatches: int = Field(1, gt=0, description="optimizer steps the rollouts are divided among")
    epochs: int = Field(1, gt=0, description="times the rollouts are gone through")
    replay_routing: bool = Field(
        False, description="train on the experts chosen while sampling (slower sampling on a CPU)"
    )


class TaskSection(Recipe):
    """One of ``dsv3 tasks list``."""

    name: str = Field(description="the task")
    difficulty: int = Field(1, ge=1, le=5, description="1 to 5")
    weight: float = Field(1.0, gt=0, description="share of the prompts, relative to the other sources")


class PromptsSection(Recipe):
    """Rows with a column prompt (text or messages); the other columns go to the reward functions."""

    paths: tuple[str, ...] = Field((), description="files of JSON lines or parquet, folders of datasets")
    weight: float = Field(1.0, gt=0, description="share of the prompts, relative to the tasks")


class RewardSection(Recipe):
    """A reward function with its weight."""

    function: str = Field(
        description="task, boxed, format, overlong; model:FOLDER (dsv3 reward's), judge:FOLDER; FILE.py:NAME"
    )
    weight: float = Field(1.0, description="weight in the sum of those that apply")
    style: Literal["trl", "verl"] = Field("trl", description="signature of a function of yours")


class EvaluationSection(Recipe):
    """Held-out examples of the tasks, answered greedily."""

    every: int = Field(20, gt=0, description="steps between evaluations")
    examples: int = Field(100, ge=0, description="held-out examples a task; 0: no evaluation")


class ShownSection(Recipe):
    """The table of completions in the terminal; all of them are in samples.jsonl."""

    every: int = Field(10, gt=0, description="batches of rollouts between tables")
    rows: int = Field(4, ge=0, description="completions shown; 0: no table")


class AnswersSection(BatchSection):
    """Answers a step."""

    sequences: int = Field(128, gt=0, description="answers an optimizer step, whole groups")
    micro_sequences: int = Field(32, gt=0, description="answers a forward and backward pass")


class GRPORecipe(TrainRecipe):
    """Everything a GRPO run needs to know."""

    stage: ClassVar[str] = "grpo"

    out: str = Field("runs/grpo", description="run folder")
    start: str = Field(description="Hugging Face folder to begin from, with its tokenizer")
    steps: int = Field(gt=0, description="optimizer steps")
    tasks: list[TaskSection] = Field([], description="verifiable tasks")
    prompts: PromptsSection = Field(PromptsSection(), description="prompts from files")
    system: str | None = Field(None, description="system prompt before every prompt that is a text")
    rewards: list[RewardSection] = Field([RewardSection(function="task")], description="reward functions")
    on_crash: Literal["stop", "skip"] = Field(
        "stop", description="when a reward function crashes: stop, or leave the sample out; both name it"
    )
    rollouts: RolloutSection = Field(RolloutSection(), description="sampling")
    policy: PolicySection = Field(PolicySection(), description="loss")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="held-out accuracy")
    shown: ShownSection = Field(ShownSection(), description="table of completions")
    batch: AnswersSection = Field(AnswersSection(), description="answers")
    optimizer: OptimizerSection = Field(
        OptimizerSection(lr=1e-6, weight_decay=0.0),
        description="optimizer; tiny models: lr 300 times as high",
    )
    balance: BalanceSection = Field(
        BalanceSection(gamma=0.0), description="gamma must be 0: the experts' biases stay as they are"
    )
    mtp: MTPSection = Field(
        MTPSection(weight=0.0), description="weight must be 0: the MTP module drafts and is not trained"
    )

    @property
    def rollout_prompts(self) -> int:
        """Prompts a batch of rollouts."""
        return self.batch.sequences * self.rollouts.minibatches // self.rollouts.answers

    @model_validator(mode="after")
    def _check_grpo(self) -> Self:
        answers = self.rollouts.answers
        if self.batch.sequences % answers:
            raise ValueError(
                f"batch.sequences ({self.batch.sequences}) must be a multiple of rollouts.answers ({answers})"
            )
        if self.rollouts.max_tokens >= self.sequence_length:
            raise ValueError(
                f"rollouts.max_tokens ({self.rollouts.max_tokens}) must be below sequence_length"
                f" ({self.sequence_length}), which holds prompt and answer"
            )
        if self.rollouts.draft_tokens and not self.model.num_nextn_predict_layers:
            raise ValueError(
                f"rollouts.draft_tokens ({self.rollouts.draft_tokens}) needs an MTP module, and the model has"
                " none; use 0"
            )
        if self.rollouts.replay_routing and self.compile:
            raise ValueError("rollouts.replay_routing and compile exclude each other; switch one of them off")
        if not self.tasks and not self.prompts.paths:
            raise ValueError("tasks and prompts.paths are empty; name at least one source of prompts")
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one function")
        # Rows are padded, so loads would count padding; MTP's loss would pull at what the policy shares.
        if self.balance.gamma:
            raise ValueError(f"balance.gamma ({self.balance.gamma}) must be 0: GRPO leaves the biases alone")
        if self.mtp.weight:
            raise ValueError(f"mtp.weight ({self.mtp.weight}) must be 0: GRPO leaves the MTP module alone")
        if any(piece.to != 1 for piece in self.schedule.batch):
            raise ValueError("schedule.batch must stay at 1: a step has batch.sequences answers")
        return self
