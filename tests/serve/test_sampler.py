"""Distributions against a slow reference a row; draws; seeds; log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dsv3.serve.sampler as sampler_module
from dsv3.common.errors import UserError
from dsv3.serve.params import SamplingParams
from dsv3.serve.sampler import Row, adjust, choose, draw, logprobs, probabilities, uniform
from dsv3.serve.sequence import Sequence
from dsv3.serve.text import Detokeniser

V = 12


def sequence(params: SamplingParams, prompt: list[int], answer: list[int] = [], seed: int = 0) -> Sequence:  # noqa: B006
    made = Sequence("r", 0, list(prompt), params, seed, 1000, frozenset(), Detokeniser(None))
    made.tokens += answer
    return made


def slow(logits: list[float], row: Row) -> list[float]:
    """One row in float64, step by step as documented."""
    p = row.sequence.params
    answer = row.sequence.answer + list(row.guessed)
    for token in range(V):
        if token in answer or token in row.sequence.tokens:
            logits[token] *= p.repetition_penalty if logits[token] < 0 else 1 / p.repetition_penalty
        logits[token] -= p.frequency_penalty * answer.count(token)
        logits[token] -= p.presence_penalty * (token in answer)
        logits[token] += p.logit_bias.get(token, 0.0)
    if p.temperature == 0:
        return [float(token == logits.index(max(logits))) for token in range(V)]
    weights = [math.exp((x - max(logits)) / p.temperature) for x in logits]
    order = sorted(range(V), key=lambda token: -logits[token])
    kept = order[: p.top_k or V]
    total, mass, chosen = sum(weights[t] for t in kept), 0.0, []
    for token in kept:  # the smallest set of the likeliest whose mass reaches top_p
        if p.top_p < 1 and mass >= p.top_p - 1e-6:
            break
        chosen.append(token)
        mass += weights[token] / total
    chosen = [token for token in chosen if weights[token] >= p.min_p * weights[order[0]]]
    total = sum(weights[t] for t in chosen)
    return [weights[t] / total if t in chosen else 0.0 for t in range(V)]


wishes = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.3, 1.0, 2.5]),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
        "top_k": st.integers(0, V + 2),
        "min_p": st.sampled_from([0.0, 0.05, 0.4, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.5]),
        "presence_penalty": st.sampled_from([-0.5, 0.0, 1.0]),
        "frequency_penalty": st.sampled_from([-0.3, 0.0, 0.7]),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5, width=16), max_size=2),
    },
)
tokens = st.lists(st.integers(0, V - 1), max_size=6)


@pytest.mark.parametrize("head", [3, 1024])
@given(
    st.lists(st.tuples(wishes, tokens.filter(bool), tokens, tokens), min_size=1, max_size=4),
    st.integers(0, 999),
)
def test_distributions(
    head: int, asked: list[tuple[dict[str, Any], list[int], list[int], list[int]]], seed: int
) -> None:
    rows = [
        Row(sequence(SamplingParams(**wish), prompt, answer), tuple(guessed))
        for wish, prompt, answer, guessed in asked
    ]
    logits = 2 * torch.randn(len(rows), V, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "HEAD", head)  # whether or not the first look is enough
        found = probabilities(adjust(logits, rows), [row.sequence.params for row in rows])
    assert torch.equal(logits, before)  # log-probabilities are taken from these
    wanted = [slow(row_logits, row) for row_logits, row in zip(before.double().tolist(), rows)]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    chosen, _ = choose(logits, rows)
    assert all(found[number, token] > 0 for number, token in enumerate(chosen))


@pytest.mark.parametrize("size", [600, 5000])
def test_top_p_beyond_the_tokens_looked_at_first(size: int) -> None:
    """An even distribution: nine tenths of all tokens stay, more than the first look sees."""
    logits = torch.linspace(0, 1e-3, size)[None]
    found = probabilities(logits, [SamplingParams(top_p=0.9)])
    assert abs(int((found > 0).sum()) - 0.9 * size) <= 0.01 * size
    assert found[0, 0] == 0 and found[0, -1] > 0


def test_bias_beyond_the_vocabulary_is_ignored() -> None:
    row = Row(sequence(SamplingParams(logit_bias={V: 5.0, 2: 1.0}, repetition_penalty=2.0), [V + 3, 1]))
    assert adjust(torch.zeros(1, V), [row])[0].tolist() == [0, 0, 1, *[0] * (V - 3)]


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    uniforms = [uniform(5, place, 0) for place in range(20000)]
    counts = Counter(draw(weights.expand(len(uniforms), -1), uniforms))
    assert set(counts) == {1, 3, 4}
    for token, share in ((1, 0.1), (3, 0.6), (4, 0.3)):
        assert abs(counts[token] / len(uniforms) - share) < 4 * math.sqrt(share * (1 - share) / len(uniforms))


def test_draws_at_the_ends() -> None:
    weights = torch.tensor([[0.0, 1e-8, 1.0, 0.0]])
    assert draw(weights, [0.0]) == [1] and draw(weights, [1 - 2**-48]) == [2]


def test_uniform_numbers_are_spread_and_unrelated() -> None:
    streams = [
        torch.tensor([uniform(seed, place, purpose) for place in range(4000)])
        for seed in (0, 1, 2**62)
        for purpose in (0, 1, 2)
    ]
    for numbers in streams:
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = torch.histc(numbers, 10, 0, 1)
        assert ((counts - 400) ** 2 / 400).sum() < 28  # chi-squared, 9 degrees: 1 in 1000
    related = torch.corrcoef(torch.stack([*streams, streams[0].roll(1)])) - torch.eye(len(streams) + 1)
    assert related.abs().max() < 0.07  # 4.4 standard deviations


def test_seed_and_place_decide_and_the_batch_does_not() -> None:
    logits = torch.randn(3, V)
    params = SamplingParams(temperature=1.5, seed=1)
    rows = [Row(sequence(params, [1, 2, 3], seed=seed)) for seed in (1, 2, 3)]
    together, _ = choose(logits, rows)
    assert together == [choose(logits[n : n + 1], rows[n : n + 1])[0][0] for n in range(3)]
    places = [choose(logits[:1], [Row(sequence(params, [1] * n, seed=1))])[0][0] for n in range(1, 30)]
    assert len(set(places)) > 3
    guessed = choose(logits[:1], [Row(sequence(params, [1, 2]), (3,))])
    assert guessed[0] == choose(logits[:1], [Row(sequence(params, [1, 2, 3]))])[0]


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(2, V)
    first, second = logprobs(logits, [3, 4], [2, 0])
    wanted = logits.double().log_softmax(-1)
    assert first.token_id == 3 and abs(first.logprob - float(wanted[0, 3])) < 1e-5
    assert [token for token, _ in first.top] == logits[0].topk(2)[1].tolist()
    assert abs(first.top[1][1] - float(wanted[0, first.top[1][0]])) < 1e-5
    assert second.token_id == 4 and second.top == []


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"temperature": -1}, r"temperature \(-1\) must be from 0 to 100"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, r"top_p \(0\) must be at least 1e-06"),
        ({"top_p": 5e-324}, r"top_p \(5e-324\) must be at least"),
        ({"repetition_penalty": 5e-324}, r"repetition_penalty \(5e-324\) must be at least 0.01"),
        ({"temperature": 1e-9}, r"temperature \(1e-09\) must be 0.* or at least 0.0001"),
        ({"top_p": 1.5}, r"top_p \(1.5\) must be from 0 to 1"),
        ({"max_tokens": -1}, r"max_tokens \(-1\) must be at least 0"),
        ({"max_tokens": 1.5}, r"max_tokens \(1.5\) must be a whole number"),
        ({"max_tokens": True}, r"max_tokens \(True\) must be a whole number"),
        ({"logprobs": 21}, r"logprobs \(21\) must be from 0 to 20"),
        ({"n": 0}, r"n \(0\) must be from 1"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 3]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_refusals(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**wish)


def test_one_stop_text_is_a_list_of_one() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert replace(SamplingParams(stop="ab"), n=2).stop == ("ab",)
