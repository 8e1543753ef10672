"""Log-probabilities of a prompt's own tokens, beside one forward of the model over it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.model import DeepSeekV3
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.serve.sequence import Sequence, TokenLogprob
from dsv3.serve.updates import Update
from tests.model.build import tiny_model

READ = SamplingParams(max_tokens=0, prompt_logprobs=2)


@cache
def model() -> DeepSeekV3:
    return tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1).eval()


@cache
def prompt(number: int) -> tuple[int, ...]:
    return tuple(torch.randint(61, (60,), generator=torch.Generator().manual_seed(number)).tolist())


@cache
@torch.no_grad()
def plain(tokens: tuple[int, ...]) -> torch.Tensor:
    return model()(torch.tensor([tokens]), mtp=False).logits_BTV[0].log_softmax(-1)


def check(found: list[TokenLogprob | None], tokens: tuple[int, ...], count: int, start: int = 1) -> None:
    assert len(found) == len(tokens) and not any(found[:start])
    for place, score in enumerate(found[start:], start=start):
        row = plain(tokens)[place - 1]
        assert score is not None and score.token_id == tokens[place]
        assert abs(score.logprob - float(row[tokens[place]])) < 2e-4
        assert len(score.top) == count
        for (token, logprob), best in zip(score.top, row.topk(count)[0].tolist()):
            assert abs(logprob - best) < 2e-4 and abs(float(row[token]) - best) < 2e-4


def run(engine: Engine) -> list[Update]:
    found = []
    while engine.busy:
        found += engine.step()
    return found


asks = st.tuples(
    st.integers(0, 1).flatmap(lambda n: st.integers(1, 60).map(lambda length: prompt(n)[:length])),
    st.none() | st.integers(0, 3),  # prompt_logprobs
    st.just(1) | st.integers(1, 70),  # prompt_logprobs_from
    st.integers(0, 9),  # max_tokens
    st.integers(1, 2),  # n
)


@settings(max_examples=15)
@given(st.lists(asks, min_size=1, max_size=5), st.integers(0, 2), st.integers(0, 60), st.integers(6, 12))
def test_any_schedule(
    wanted: list[tuple[tuple[int, ...], int | None, int, int, int]], drafts: int, budget: int, blocks: int
) -> None:
    """Cut prompts, shared beginnings, preemption, drafts: each score once, with the first update."""
    engine = Engine(
        model(),
        options=Options(
            draft_tokens=drafts,
            max_batch=4,
            max_batch_tokens=4 * (1 + drafts) + budget,
            max_length=72,
            cache_tokens=16 * blocks,
        ),
    )
    for number, (tokens, count, start, length, n) in enumerate(wanted):
        wish = SamplingParams(
            max_tokens=length,
            prompt_logprobs=count,
            prompt_logprobs_from=start,
            n=n,
            temperature=0.9,
            seed=1,
            ignore_eos=True,
        )
        engine.add_request(tokens, wish, str(number))
    told: dict[tuple[str, int], list[Update]] = {}
    for update in run(engine):
        told.setdefault((update.request_id, update.index), []).append(update)
    for number, (tokens, count, start, length, n) in enumerate(wanted):
        for index in range(n):
            updates = told[str(number), index]
            scores = [update.prompt_logprobs for update in updates]
            assert not any(scores[1:])
            if count is None or index:
                assert scores[0] == []
            else:
                check(scores[0], tokens, count, start)
            assert sum(len(update.token_ids) for update in updates) == length
            assert updates[-1].finish_reason == "length"
    assert engine.blocks.used == 0


def test_rows_of_the_cache_tell_nothing() -> None:
    """A prompt known from before is computed again, and only then; its rows serve the next one."""
    llm = dsv3.LLM(model(), cache_tokens=512)
    tokens = prompt(0)[:50]
    for _ in range(2):
        (out,) = llm.generate([tokens], READ)
        check(out.prompt_logprobs, tokens, 2)
        assert out.usage.cached_tokens == 0 and out.usage.completion_tokens == 0
        assert (out.token_ids, out.text, out.finish_reason) == ([], "", "length")
    (out,) = llm.generate([tokens], SamplingParams(max_tokens=0))
    assert out.usage.cached_tokens == 48 and out.prompt_logprobs == [] and out.finish_reason == "length"


def test_places_left_out_come_from_the_cache() -> None:
    llm = dsv3.LLM(model(), cache_tokens=512)
    tokens = prompt(0)[:50]
    llm.generate([tokens], SamplingParams(max_tokens=0))
    (out,) = llm.generate([tokens], SamplingParams(max_tokens=0, prompt_logprobs=2, prompt_logprobs_from=40))
    check(out.prompt_logprobs, tokens, 2, start=40)
    assert out.usage.cached_tokens == 32  # whole blocks of the 39 tokens before


def test_scores_outlive_preemption() -> None:
    """Given back half read, a prompt goes on where it was."""
    engine = Engine(
        model(), options=Options(max_batch=2, max_batch_tokens=3, max_length=64, cache_tokens=16 * 6)
    )
    engine.add_request(prompt(0)[:30], SamplingParams(max_tokens=30, ignore_eos=True, seed=0))
    request = engine.add_request(prompt(1)[:44], SamplingParams(max_tokens=9, prompt_logprobs=1, seed=0))
    (sequence,) = engine.requests[request]
    halves = kept = 0
    while engine.busy:
        known = len(sequence.prompt_logprobs or [])
        before = sequence.preemptions
        engine.step()
        halves += sequence.preemptions > before and 1 < known < 44
        kept = max(kept, sequence.reused)
    assert halves and kept
    check(sequence.prompt_logprobs or [], prompt(1)[:44], 1)


def test_other_vocabularies_and_lengths() -> None:
    engine = Engine(model(), options=Options(cache_tokens=256, max_length=40))
    engine.vocab_size = 50  # as of a tokenizer smaller than the model
    with pytest.raises(dsv3.UserError, match="the prompt holds token 55; the model knows 0 to 49"):
        engine.add_request([1, 55], READ)
    engine.add_request([1, 55], SamplingParams(max_tokens=1))
    engine.add_request([1] * 40, SamplingParams(max_tokens=0))
    with pytest.raises(dsv3.UserError, match="the prompt has 41 tokens and max_length is 40"):
        engine.add_request([1] * 41, SamplingParams(max_tokens=0))
    with pytest.raises(dsv3.UserError, match="the prompt has 40 tokens and max_length is 40"):
        engine.add_request([1] * 40, SamplingParams(max_tokens=1))
    assert [update.finish_reason for update in run(engine)] == ["length", "length"]


def test_scores_that_are_not_numbers_are_an_error() -> None:
    broken = tiny_model(num_hidden_layers=2)
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    engine = Engine(broken, options=Options(cache_tokens=256))
    made: list[Sequence] = []
    for length in (0, 3):
        wish = SamplingParams(max_tokens=length, prompt_logprobs=1)
        made += engine.requests[engine.add_request([1, 2, 3], wish)]
    run(engine)
    assert [(s.finish_reason, s.answer) for s in made] == [("error", []), ("error", [])]
    assert engine.blocks.used == 0
