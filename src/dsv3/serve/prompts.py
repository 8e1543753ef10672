"""What callers from Python pass as prompts and parameters, read in one way by every face."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dsv3.common.errors import UserError
from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.params import SamplingParams

Prompt = str | Sequence[int]


def encode(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """A prompt as token ids; an empty text is a begin-of-sentence token."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("a text prompt needs a tokenizer: pass tokenizer=..., or token ids as the prompt")
        return tokenizer.encode(prompt) or [tokenizer.bos_id]
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise UserError(f"prompt ({prompt!r:.60}) must be a text or a list of token ids") from None


def pairs(
    prompts: Prompt | Iterable[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    encoded: Callable[[Prompt], list[int]],
) -> list[tuple[list[int], SamplingParams]]:
    """Each prompt of one or many as token ids, with its parameters: the same for all, or one each."""
    listed: list[Any] = [prompts]
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping):
        listed = list(prompts)
        if listed and isinstance(listed[0], int):
            listed = [listed]
    many = [encoded(prompt) for prompt in listed]
    wishes = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(many)
    if len(wishes) != len(many):
        raise UserError(f"params ({len(wishes)}) must be one, or as many as prompts ({len(many)})")
    for wish in wishes:
        if not isinstance(wish, SamplingParams):
            raise UserError(f"params ({wish!r:.60}) must be dsv3.SamplingParams(...), or a list of them")
    return list(zip(many, wishes))
