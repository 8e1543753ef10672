"""Log-likelihoods of continuations, read by the engine; what prompts share is computed once.

Contexts and continuations are cut into tokens as lm-evaluation-harness does it, so that scores compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.common.errors import Failure
from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.llm import LLM
from dsv3.serve.options import BLOCK_SIZE
from dsv3.serve.params import SamplingParams


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation after its context.

    ``logprob``: nats, summed over its tokens. ``greedy``: whether each token was the likeliest in its place.
    ``truncated``: the beginning of the context did not fit and was left out.
    """

    logprob: float
    greedy: bool
    truncated: bool


@dataclass(frozen=True)
class Pair:
    """Token ids of context and continuation together; ``start``: the continuation's first."""

    ids: list[int]
    start: int


def pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Encode both as one text and cut it where the context alone would end.

    Spaces at the context's end go to the continuation; an empty context is a begin-of-sentence token.
    """
    bare = context.rstrip()
    if not context:
        ids = tokenizer.encode(continuation)
        return Pair(ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids], 1)
    ids = tokenizer.encode(context + continuation)
    return Pair(ids, min(len(tokenizer.encode(bare)), len(ids) - 1) or 1)


def likelihoods(llm: LLM, pairs: Sequence[Pair]) -> list[Likelihood]:
    """Likelihoods in the order given. Raises :class:`Failure` where they are not numbers."""
    longest = llm.engine.max_length
    kept = [Pair(pair.ids[-longest:], max(1, pair.start - max(0, len(pair.ids) - longest))) for pair in pairs]
    _read_shared(llm, kept)
    outs = llm.generate(
        [pair.ids for pair in kept],
        [SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_from=pair.start) for pair in kept],
    )
    found = []
    for whole, cut, out in zip(pairs, kept, outs):
        if out.finish_reason == "error":
            raise Failure("the model's logits are not finite: its weights are broken, or a format overflows")
        tokens = [token for token in out.prompt_logprobs if token is not None]
        found.append(
            Likelihood(
                sum(token.logprob for token in tokens),
                all(token.top[0][0] == token.token_id for token in tokens),
                len(cut.ids) < len(whole.ids),
            )
        )
    return found


def _read_shared(llm: LLM, pairs: Sequence[Pair]) -> None:
    """Fill the cache with the beginning all prompts share, then with each context that comes more than once.

    Sequences of one batch are computed side by side and do not find each other's rows.
    """
    contexts = [tuple(pair.ids[: pair.start]) for pair in pairs]
    low, high = min(contexts, default=()), max(contexts, default=())  # in the order of words
    count = next((n for n, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    shared = low[:count] if len(contexts) > 1 else ()
    often = [context for context, times in Counter(contexts).items() if times > 1]
    for stage in ([shared], often):
        wanted = [list(ids) for ids in stage if len(ids) >= 2 * BLOCK_SIZE]
        if wanted:
            llm.generate(wanted, SamplingParams(max_tokens=0))
