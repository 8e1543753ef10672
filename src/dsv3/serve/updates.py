"""What an engine tells: tokens added to an answer, what a request used, counts since the start."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from dsv3.serve.sequence import Sequence, TokenLogprob


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. ``cached_tokens``: of the prompt, found in the cache. ``drafted``, ``accepted``:
    tokens the MTP module proposed, and those of them that stood."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Update:
    """What a step added to one answer of a request. ``usage`` comes with the request's last update.

    ``finish_reason``: None while there is more to come; stop, length, or error where the model's logits were
    not finite or the grammar ran into a limit. ``prompt_logprobs``: with the first update of answer 0, if
    they were asked for: one a token of the prompt, None for the first and those left out.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)


@dataclass
class Stats:
    """Counted since the engine started. ``accepted_at[j]``: drafts that stood as the j-th of their step."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Share of the drafts that stood; nan without any."""
        drafted = sum(self.drafted_at)
        return sum(self.accepted_at) / drafted if drafted else float("nan")


def usage_of(sequences: Many[Sequence]) -> Usage:
    """Tokens of a request with these answers; the prompt is counted once."""
    return Usage(
        prompt_tokens=sequences[0].prompt_length,
        completion_tokens=sum(len(s.tokens) - s.prompt_length for s in sequences),
        cached_tokens=sequences[0].cached_tokens or 0,
        drafted=sum(s.drafted for s in sequences),
        accepted=sum(s.accepted for s in sequences),
    )
