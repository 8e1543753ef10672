"""Typed recipe of distillation (report 5.1): prompts, the expert that answers, what is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dsv3.config.recipe import Recipe

SYSTEM = (
    "Think first, between <think> and </think>: work in small steps and check the result."
    " Then give the answer in \\boxed{}."
)


class TaskPrompts(Recipe):
    """Prompts drawn from one of the verifiable tasks."""

    name: str = Field(description="a name of `dsv3 tasks list`")
    difficulty: int = Field(1, ge=1, le=5, description="1 to 5")
    count: int = Field(gt=0, description="different prompts")


class PromptsSection(Recipe):
    """What is asked: drawn from tasks, read from a file, or both."""

    tasks: list[TaskPrompts] = Field([], description="verifiable tasks, and how many prompts of each")
    split: Literal["train", "validation", "test"] = Field(
        "train", description="split of the tasks; they share no example"
    )
    seed: int = Field(0, ge=0, description="of the draws from the tasks")
    file: str | None = Field(
        None,
        description="own problems, JSON lines or parquet: prompt, and solution or answer (a boxed answer is"
        " compared with it), or task, answer and metadata as `dsv3 tasks show --json` prints them",
    )

    @model_validator(mode="after")
    def _some(self) -> PromptsSection:
        if not self.tasks and self.file is None:
            raise ValueError("prompts needs tasks or file; see recipes/distill-tiny.yaml")
        return self


class ExpertSection(Recipe):
    """Who answers."""

    kind: Literal["solver", "engine", "endpoint"] = Field(
        "solver",
        description="solver: the tasks' own steps; engine: a model folder in this process; endpoint: a server"
        " that speaks OpenAI's API",
    )
    slips: float = Field(
        0.0, ge=0, le=1,
        description="solver: chance of one wrong character in the answer, for failed answers without a model",
    )  # fmt: skip
    model: str | None = Field(
        None, description="engine: Hugging Face folder; endpoint: the name the server knows the model by"
    )
    quantize: Literal["fp8", "int8", "int4"] | None = Field(
        None, description="engine: keep the weights so; null: as stored"
    )
    draft_tokens: int = Field(0, ge=0, le=8, description="engine: drafts a step by the MTP module")
    base_url: str | None = Field(None, description="endpoint: its address, up to and with /v1")
    api_key_variable: str = Field(
        "OPENAI_API_KEY", description="endpoint: environment variable that holds the key; may be unset"
    )
    concurrency: int = Field(16, gt=0, le=1024, description="answers at once")
    timeout: float = Field(120.0, gt=0, description="endpoint: seconds an answer may take")
    retries: int = Field(
        4, ge=0, le=20, description="endpoint: times a request is sent again after an error, waiting longer"
    )
    give_up: int = Field(
        8, gt=0, description="endpoint: requests in a row that failed, retries included, before the run stops"
    )

    @model_validator(mode="after")
    def _named(self) -> ExpertSection:
        if self.kind != "solver" and not self.model:
            raise ValueError(f"expert.model is required with expert.kind {self.kind}")
        if self.kind == "endpoint" and not (self.base_url or "").startswith(("http://", "https://")):
            raise ValueError(
                f"expert.base_url ({self.base_url}) must be an address such as http://127.0.0.1:8000/v1"
            )
        return self


class SamplingSection(Recipe):
    """How the expert answers. The report samples at a high temperature; its value is not published."""

    samples: int = Field(4, gt=0, le=1024, description="answers a prompt")
    temperature: float = Field(1.0, ge=0, le=100, description="0: the likeliest token each time")
    top_p: float = Field(0.95, gt=0, le=1, description="share of the probability to draw from; 1: all")
    max_tokens: int = Field(1024, gt=0, description="tokens an answer; one cut off there is dropped")


class RejectionSection(Recipe):
    """What is kept (report 5.1): the correct and concise, without mixed languages and repetition."""

    least_score: float = Field(1.0, gt=0, le=1, description="score from which an answer is right")
    keep: int = Field(1, gt=0, description="right answers kept a prompt, the shortest first")
    foreign: float = Field(
        0.02, ge=0, le=1,
        description="share of words in another script than the prompt's, above which languages are mixed",
    )  # fmt: skip
    repeated: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of runs of 8 words that came before, above which it loops",
    )


class TeacherSection(Recipe):
    """Distillation by logits, beside the loss of a training stage: KL(teacher || student) is added to it."""

    path: str | None = Field(
        None, description="Hugging Face folder of a model with the same tokenizer; null: none"
    )
    weight: float = Field(1.0, gt=0, description="of the divergence, beside the next-token loss")
    top_k: int = Field(64, gt=0, description="the teacher's likeliest tokens told apart; the rest is one")


class DistillRecipe(Recipe):
    """Everything `dsv3 distill` needs to know."""

    out: str = Field("runs/distill", description="folder to write")
    seed: int = Field(0, ge=0, description="of the sampling")
    prompts: PromptsSection = Field(description="what is asked")
    system: str = Field(SYSTEM, description="system prompt of the expert and of the reasoned samples")
    expert: ExpertSection = Field(ExpertSection(), description="who answers")
    sampling: SamplingSection = Field(SamplingSection(), description="how it answers")
    rejection: RejectionSection = Field(RejectionSection(), description="what is kept")
    originals: bool = Field(
        True, description="write the problems with their source's own answers too, the report's first kind"
    )
