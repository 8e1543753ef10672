"""One answer in the making: its tokens, where its cache rows are, and how far it has got."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from dsv3.serve.grammar import Matcher
from dsv3.serve.params import SamplingParams
from dsv3.serve.text import Detokeniser

_arrivals = itertools.count()


@dataclass
class TokenLogprob:
    """Natural logarithm of the probability the model gave a token, before temperature and the rest.

    ``top``: the likeliest tokens there with theirs, in order, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(eq=False)
class Sequence:
    """A request's prompt and one of its answers.

    ``tokens``: prompt, then answer. ``computed``: leading tokens whose rows are in the cache; a sequence that
    waits for its next token has ``computed == len(tokens) - 1``. ``blocks``: its cache blocks, in order, and
    ``slots`` the cache row of each place they hold. ``digests``: the names of its leading full blocks.

    ``drafts``: guesses of the tokens that follow, and ``draft_probs`` ``[drafts, V]``, the distributions they
    were drawn from (None when greedy). Both stay when the sequence is preempted, so that its answer does not
    depend on what else was there. ``matcher``: where the answer stands in its grammar (None for a free one).

    ``prompt_logprobs``: those of the prompt's leading tokens, as far as they are known (the first has none);
    None if nobody asked.
    """

    request_id: str
    index: int
    tokens: list[int]
    params: SamplingParams
    seed: int
    max_length: int
    stop_ids: frozenset[int]
    text: Detokeniser
    leader: Sequence | None = None
    matcher: Matcher | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    prompt_length: int = 0
    computed: int = 0
    reused: int = 0
    cached_tokens: int | None = None
    blocks: list[int] = field(default_factory=list)
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    digests: list[bytes] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    draft_probs: Tensor | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    arrival: int = field(default_factory=lambda: next(_arrivals))

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def answer(self) -> list[int]:
        """Token ids generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def reusable(self) -> int:
        """Leading tokens whose rows may come from the cache: of the others the states are wanted too."""
        scored = self.prompt_logprobs
        if scored is not None and len(scored) < self.prompt_length:
            return len(scored) - 1
        return len(self.tokens) - 1

    @property
    def finished(self) -> bool:
        """Whether the answer has ended, for whatever reason."""
        return self.finish_reason is not None

    def extend(self, token_ids: list[int], logprobs: list[TokenLogprob]) -> None:
        """Append new tokens up to the first that ends the answer; what follows it is dropped.

        A token that the grammar does not take ends it in an error: the grammar ran into a limit.
        """
        for place, token in enumerate(token_ids):
            if self.matcher is not None and not self.matcher.advance(token):
                self.end("error")
                return
            self.tokens.append(token)
            if logprobs:
                self.logprobs.append(logprobs[place])
            ended = token in self.stop_ids
            matched = self.text.push(token, hidden=ended)
            if ended or matched or (self.matcher is not None and self.matcher.complete):
                self.end("stop", matched)
                return
            if len(self.tokens) >= self.max_length:
                self.end("length")
                return

    def end(self, reason: str, matched: bool = False) -> None:
        """No more tokens come. ``matched``: a stop text ended the answer."""
        self.finish_reason, self.matcher = reason, None
        self.text.close(matched)
