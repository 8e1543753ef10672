"""What a benchmark is: questions, and either choices to be ranked by likelihood or a judge of answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.data.chat import Message, encode
from dsv3.data.tokenizer import Tokenizer

Scores = dict[str, float]


@dataclass(frozen=True)
class Question:
    """One item as the model sees it.

    ``prompt``: text, or the messages of a conversation that the assistant is to answer. ``choices``: pairs of
    (context, continuation) to be ranked, of which number ``gold`` is right; with a single one its likelihood
    is what is asked. Without any, the answer is free and ``reference`` is what the judge compares it with
    (JSON values). ``own``: the words of this item alone, answers included, for the contamination report.
    """

    id: str
    prompt: str | list[Message] = ""
    choices: tuple[tuple[str, str], ...] = ()
    gold: int = 0
    reference: Any = None
    own: str = ""

    def digest(self) -> str:
        """16 hex digits of all of it: an answer is kept for exactly this question."""
        content = [self.id, self.prompt, self.choices, self.gold, self.reference]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt of a free answer, ready to be continued."""
        if isinstance(self.prompt, str):
            return tokenizer.encode(self.prompt) or [tokenizer.bos_id]
        return encode(tokenizer, self.prompt, add_generation_prompt=True)[0]


Judge = Callable[[Sequence[Question], Sequence[str]], list[Scores]]


@dataclass(frozen=True)
class Benchmark:
    """Questions and how they are asked.

    ``metric``: the score that is shown first. ``judge``: scores of answers, one a question; None where the
    choices are ranked. ``shots``: worked examples in each prompt. ``max_tokens``, ``stop``: of an answer.
    ``note``: what a reader of the score should know.
    """

    name: str
    metric: str
    questions: list[Question]
    judge: Judge | None = None
    shots: int = 0
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    note: str = ""
