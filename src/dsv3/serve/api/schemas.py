"""What clients may send, every number bounded, and what they get. Names are OpenAI's and DeepSeek's.

Unknown fields are ignored, as OpenAI does, and logged for who looks (debug). Fields without a meaning here
(``user``, ``store``, ``metadata``, ...) are unknown ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import TypedDict

from dsv3.serve.params import TOP_LOGPROBS

MOST_ANSWERS = 128
MOST_MESSAGES = 10_000
MOST_TOKENS = 2**31 - 1

Count = Annotated[int, Field(ge=0, le=MOST_TOKENS, strict=True)]
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS, strict=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Open(BaseModel):
    """A model that keeps unknown fields, so that they can be logged, and has no use for them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Open):
    """What a stream brings beside the answer."""

    include_usage: bool = Field(False, description="a last chunk with the usage")


class Sampling(Open):
    """What both endpoints take."""

    model: str | None = Field(None, max_length=256, description="the served model's name; may be left out")
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS, strict=True, description="answers; 1 unless told")
    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token; default 1")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MOST_TOKENS, strict=True, description="0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024, description="token id, as text, to what is added to its logit"
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, strict=True)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError("keys must be token ids")
        return value

    @model_validator(mode="after")
    def _streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class TextPart(Open):
    """A piece of a message; images are refused."""

    type: Literal["text"]
    text: str


class FunctionCall(Open):
    """A function's name, and its arguments as JSON text."""

    name: str = Field(max_length=256)
    arguments: str = "{}"


class ToolCall(Open):
    """A call an assistant's earlier message made."""

    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Open):
    """One message of a conversation; ``prefix`` asks to continue it (DeepSeek's)."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)
    prefix: bool | None = Field(None, description="the last message, the assistant's: to be continued")
    reasoning_content: str | None = Field(None, description="with prefix: the reasoning before it")

    @property
    def text(self) -> str | None:
        """The content, its parts joined."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content


class Function(Open):
    """A function the model may call; ``parameters`` is a JSON schema."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")


class Tool(Open):
    """A tool the model may use: always a function."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Open):
    """The function a request insists on."""

    name: str


class NamedTool(Open):
    """``tool_choice`` that insists on one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Open):
    """The schema an answer must keep to."""

    # Read as "schema", which is a name of pydantic's own.
    body: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Open):
    """Free text, any JSON object, or a document under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema: {name, schema}")
        return self


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: Count | None = Field(None, ge=1, description="default: what the context has room for")
    max_completion_tokens: Count | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS, strict=True)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _belongs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("tools: two have the same name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice names a tool that is not among tools")
        for number, message in enumerate(self.messages):
            last = number == len(self.messages) - 1
            if message.prefix and not (last and message.role == "assistant"):
                raise ValueError(f"messages[{number}].prefix is for the last message, the assistant's")
            if message.text is None and not message.tool_calls:
                raise ValueError(f"messages[{number}].content is missing")
            if message.tool_calls and message.role != "assistant":
                raise ValueError(f"messages[{number}].tool_calls are for the assistant's messages")
        return self


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    ) = Field(description="a text, token ids, or a list of either")
    suffix: str | None = Field(None, description="fill in the middle: the text behind the hole")
    max_tokens: Count | None = Field(None, description="16 unless told")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS, strict=True)
    best_of: int | None = Field(None, ge=1, le=MOST_ANSWERS, strict=True, description="must equal n")

    @model_validator(mode="after")
    def _belongs(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported")
        if self.suffix is not None and (self.echo or not isinstance(self.prompt, str)):
            raise ValueError("suffix needs a single text as prompt, and no echo")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo: true")
        return self


def unknown(model: BaseModel, where: str = "") -> list[str]:
    """The fields of a request that mean nothing here, by their paths."""
    found = [where + name for name in model.model_extra or {}]
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                found += unknown(item, f"{where}{name}.")
    return found


# What is answered.


class PromptDetails(TypedDict):
    """Tokens of the prompt that were in the cache."""

    cached_tokens: int


class CompletionDetails(TypedDict):
    """Tokens of the answer spent on reasoning; drafts by MTP that stood and that did not."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageBody(TypedDict):
    """Tokens. ``..._prediction_tokens``: drafts of the MTP module that stood, and that did not."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(TypedDict):
    """A token, its bytes, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of the answer with the likeliest beside it."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of every token of an answer."""

    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """The same in the shape of the older endpoint; offsets are in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CalledFunction(TypedDict):
    """What the model calls, its arguments as JSON text."""

    name: str
    arguments: str


class MadeCall(TypedDict):
    """A call the model made, under an id of ours."""

    id: str
    type: Literal["function"]
    function: CalledFunction


FinishReason = Literal["stop", "length", "tool_calls", "insufficient_system_resource"]


class ChatAnswer(TypedDict):
    """The assistant's message; ``reasoning_content`` stood between the think tags."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[MadeCall]]


class ChatChoice(TypedDict):
    """One of ``n`` answers of a chat."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The answer of ``/v1/chat/completions`` without ``stream``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody


class CompletionChoice(TypedDict):
    """One of ``n`` continuations of a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The answer of ``/v1/completions``, and of each of its chunks."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[UsageBody | None]


class ModelCard(TypedDict):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """All models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(TypedDict):
    """What went wrong, and in which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """Every error."""

    error: ErrorDetail
