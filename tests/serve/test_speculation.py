"""Drafts change the speed and nothing else: greedy tokens are the same, sampled ones equally distributed."""

from __future__ import annotations

import math
from collections import Counter
from copy import deepcopy
from functools import cache
from itertools import product

import pytest
import torch

from dsv3.common.errors import UserError
from dsv3.evaluate.sample import generate
from dsv3.model import DeepSeekV3
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.serve.sampler import DRAFT, Row, choose
from dsv3.serve.sequence import Sequence
from dsv3.serve.speculation import rows_to_choose, verify
from dsv3.serve.text import Detokeniser
from tests.model.build import tiny_model
from tests.serve.conftest import close, surprise

V = 5


@pytest.fixture(scope="module")
def small() -> DeepSeekV3:
    return tiny_model(vocab_size=V, num_hidden_layers=2, num_nextn_predict_layers=1).eval()


@cache
def plain(model: DeepSeekV3, prompt: tuple[int, ...], length: int) -> list[int]:
    return generate(model, list(prompt), length)


@torch.no_grad()
def exact(
    model: DeepSeekV3, prompt: list[int], length: int, temperature: float, top_k: int
) -> dict[tuple[int, ...], float]:
    """The probability of every answer, from whole forwards."""
    found = {}
    for answer in product(range(V), repeat=length):
        share = 1.0
        logits = model(torch.tensor([[*prompt, *answer]]), mtp=False).logits_BTV[0]
        for place, token in enumerate(answer):
            row = logits[len(prompt) + place - 1] / temperature
            row = row.masked_fill(row < row.topk(top_k)[0][-1], -math.inf)
            share *= float(row.softmax(-1)[token])
        found[answer] = share
    return found


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_sampled_answers_have_the_models_distribution(small: DeepSeekV3, drafts: int) -> None:
    engine = Engine(
        small,
        options=Options(
            draft_tokens=drafts, max_batch=250, max_batch_tokens=1024, cache_tokens=8192, max_length=40
        ),
    )
    prompt, length, many = [1, 3, 2, 2, 0], 3, 2000
    wish = SamplingParams(max_tokens=length, temperature=0.8, top_k=4, ignore_eos=True, seed=11, n=1000)
    counts: Counter[tuple[int, ...]] = Counter()
    for part in range(many // 1000):
        request = engine.add_request(prompt, SamplingParams(**{**vars(wish), "seed": part}))
        sequences = engine.requests[request]
        while engine.busy:
            engine.step()
        counts.update(tuple(sequence.answer) for sequence in sequences)
    assert surprise(counts, exact(small, prompt, length, 0.8, 4)) < 4
    if drafts:
        assert 0.05 < engine.stats.acceptance < 0.95  # both ways were taken, often


def test_verification_alone_for_any_drafter() -> None:
    """Two drafts from a bad drafter, thousands of seeds: tokens as from the model's distributions."""
    generator = torch.Generator().manual_seed(4)
    p_logits = torch.randn(1 + V + V * V, V, generator=generator)  # after none, each one, each pair of drafts
    q_logits = torch.randn(1 + V, V, generator=generator)
    wish, counts, many = SamplingParams(temperature=1.0), Counter[tuple[int, ...]](), 5000
    sequences = [
        Sequence("r", 0, [0], wish, seed, 1000, frozenset(), Detokeniser(None)) for seed in range(many)
    ]
    drawn = []
    for place in range(2):
        rows = [q_logits[1 + s.drafts[0] if place else 0] for s in sequences]
        tokens, weights = choose(torch.stack(rows), [Row(s, tuple(s.drafts)) for s in sequences], DRAFT)
        assert weights is not None
        drawn.append(weights)
        for sequence, token in zip(sequences, tokens):
            sequence.drafts.append(token)
    logits = []
    for sequence, draft_probs in zip(sequences, torch.stack(drawn, dim=1)):
        sequence.draft_probs = draft_probs
        first, second = sequence.drafts
        logits.append(p_logits[[0, 1 + first, 1 + V + V * first + second]])
    assert len(rows_to_choose(sequences)) == 3 * many
    firsts, lengths = Counter[tuple[int, ...]](), Counter[int]()
    for tokens in verify(torch.cat(logits), sequences):
        firsts[tuple(tokens[:1])] += 1
        lengths[len(tokens)] += 1
        if len(tokens) > 1:  # the second token, given that the first draft stood
            counts[tuple(tokens[:2])] += 1
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    assert surprise(firsts, {(a,): float(p[0, a]) for a in range(V)}) < 4
    stands = torch.minimum(p[0], q[0])  # probability of drafting a token and keeping it
    wanted = {(a, b): float(stands[a] / stands.sum() * p[1 + a, b]) for a in range(V) for b in range(V)}
    assert surprise(counts, wanted) < 4
    share = float(stands.sum())
    assert abs((many - lengths[1]) / many - share) < 4 * math.sqrt(share * (1 - share) / many)


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_greedy_is_the_same_and_drafts_save_steps(small: DeepSeekV3, drafts: int) -> None:
    prompts = [[1, 2, 3], [4], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] * 3]
    wish, saved = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True), 0
    for numbers in ([0, 1, 2], [0], [2]):
        engine = Engine(small, options=Options(draft_tokens=drafts, cache_tokens=1024, max_length=200))
        made = [engine.requests[engine.add_request(prompts[n], wish)][0] for n in numbers]
        while engine.busy:
            engine.step()
        assert [s.answer for s in made] == [plain(small, tuple(prompts[n]), 24) for n in numbers]
        assert engine.stats.steps == max(24 - s.accepted for s in made)
        saved += 24 - engine.stats.steps
        assert engine.stats.drafted_at[0] >= engine.stats.drafted_at[-1] > 0
    assert saved > 2


def test_sampled_and_greedy_requests_mix(small: DeepSeekV3) -> None:
    engine = Engine(small, options=Options(draft_tokens=2, cache_tokens=1024, max_length=200))
    wishes = [
        SamplingParams(max_tokens=30, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=1.2, seed=3, ignore_eos=True),
        SamplingParams(
            max_tokens=30, temperature=0, repetition_penalty=1.3, presence_penalty=0.4, ignore_eos=True
        ),
    ]

    def answers(wishes: list[SamplingParams]) -> list[list[int]]:
        made = [engine.requests[engine.add_request([1, 2, 3], wish)][0] for wish in wishes]
        while engine.busy:
            engine.step()
        return [sequence.answer for sequence in made]

    assert answers(wishes) == [answers([wish])[0] for wish in wishes]
    plain = Engine(small, options=Options(cache_tokens=1024, max_length=200))
    engine, with_drafts = plain, answers(wishes)
    assert [with_drafts[0], with_drafts[2]] == [answers([wishes[n]])[0] for n in (0, 2)]


def test_rows_after_known_blocks_are_those_of_a_cold_engine(model: DeepSeekV3) -> None:
    """The module's first row after known blocks wants a state that this sequence never computed."""

    def rows(warm: bool) -> torch.Tensor:
        engine = Engine(deepcopy(model), options=Options(draft_tokens=1, cache_tokens=256))
        wish = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        if warm:
            for tail in (1, 2):  # another prompt's rows are beside it, too
                engine.add_request([*shared, tail, tail], wish)
            while engine.busy:
                engine.step()
            engine.add_request([5, 4, 3], wish)
        (sequence,) = engine.requests[engine.add_request([*shared, 7, 8, 9], wish)]
        engine.step()
        assert sequence.reused == (32 if warm else 0) and engine.drafter is not None
        assert sequence.computed == 35
        return engine.cache.read(model.config.num_hidden_layers, torch.tensor(sequence.slots[1:36]))

    shared = [(7 * place) % 60 + 1 for place in range(32)]
    close(rows(True), rows(False))


def test_a_model_without_mtp_is_refused() -> None:
    with pytest.raises(UserError, match=r"draft_tokens \(1\) needs an MTP module"):
        Engine(tiny_model(), options=Options(draft_tokens=1))
