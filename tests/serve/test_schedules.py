"""Any schedule gives the same answers: cut, batched, cached, preempted, aborted, with drafts or without.

The reference is the plain generator, which reads the whole text again for every token (greedy), and an engine
of its own for the request (sampled).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.evaluate.sample import generate
from dsv3.model import DeepSeekV3
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.serve.sequence import Sequence
from tests.model.build import tiny_model

# Few tokens to choose from, so that some drafts stand although nothing was learnt.
VOCAB = 9
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@cache
def model() -> DeepSeekV3:
    return tiny_model(seed=4, vocab_size=VOCAB, num_hidden_layers=2, num_nextn_predict_layers=1).eval()


@cache
def beginning(number: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(VOCAB, (50,), generator=generator).tolist())


@cache
def plain(prompt: tuple[int, ...]) -> list[int]:
    return generate(model(), list(prompt), GREEDY.max_tokens)


@cache
def alone(prompt: tuple[int, ...], seed: int, max_tokens: int, drafts: int) -> list[int]:
    engine = Engine(model(), options=Options(draft_tokens=drafts, cache_tokens=256, max_length=100))
    return run(engine, list(prompt), sampled(seed, max_tokens))


def sampled(seed: int, max_tokens: int) -> SamplingParams:
    return replace(GREEDY, max_tokens=max_tokens, temperature=0.9, top_p=0.95, seed=seed)


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    request = engine.add_request(prompt, params)
    (sequence,) = engine.requests[request]
    while engine.busy:
        engine.step()
    return sequence.answer


def check_blocks(engine: Engine) -> None:
    """Every block is either idle or used by exactly those sequences that say so."""
    manager = engine.blocks
    users = [0] * len(manager.blocks)
    for sequence in engine.scheduler.running:
        assert len(set(sequence.blocks)) == len(sequence.blocks)
        assert len(sequence.slots) == len(sequence.blocks) * manager.size
        for number in sequence.blocks:
            users[number] += 1
    assert users == [block.users for block in manager.blocks]
    assert {number for number, count in enumerate(users) if not count} == set(manager._idle)
    for digest, number in manager._named.items():
        assert manager.blocks[number].digest == digest
    assert all(not sequence.blocks for sequence in engine.scheduler.waiting)


@dataclass(frozen=True)
class Ask:
    beginning: int
    length: int
    tail: tuple[int, ...]
    seed: int | None  # None: greedy
    max_tokens: int
    at: int  # the step at which it comes
    aborted: int | None  # and, if so, how many steps later it is given up

    @property
    def prompt(self) -> tuple[int, ...]:
        return beginning(self.beginning)[: self.length] + self.tail

    @property
    def params(self) -> SamplingParams:
        if self.seed is None:
            return replace(GREEDY, max_tokens=self.max_tokens)
        return sampled(self.seed, self.max_tokens)


asks = st.builds(
    Ask,
    beginning=st.integers(0, 1),
    length=st.integers(1, 50),
    tail=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    seed=st.none() | st.integers(0, 2),
    max_tokens=st.integers(1, GREEDY.max_tokens),
    at=st.integers(0, 12),
    aborted=st.none() | st.none() | st.integers(0, 8),
)


@settings(max_examples=25)
@given(
    st.lists(asks, min_size=1, max_size=6),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(0, 60),
    st.integers(5, 12),
)
def test_any_schedule(wanted: list[Ask], drafts: int, batch: int, budget: int, blocks: int) -> None:
    engine = Engine(
        model(),
        options=Options(
            draft_tokens=drafts,
            max_batch=batch,
            max_batch_tokens=batch * (1 + drafts) + budget,
            max_length=70,
            cache_tokens=16 * blocks,
        ),
    )
    made: dict[int, Sequence] = {}
    step = 0
    while engine.busy or len(made) < len(wanted):
        for number, ask in enumerate(wanted):
            if ask.at == step:
                request = engine.add_request(ask.prompt, ask.params, str(number))
                (made[number],) = engine.requests[request]
            if ask.aborted is not None and step == ask.at + ask.aborted:
                engine.abort(str(number))
        engine.step()
        check_blocks(engine)
        step += 1
        assert step < 2000
    assert engine.blocks.used == 0
    for number, sequence in made.items():
        ask = wanted[number]
        expected = plain(ask.prompt)[: ask.max_tokens]
        if ask.seed is not None:
            expected = alone(ask.prompt, ask.seed, ask.max_tokens, drafts)
        if sequence.finish_reason == "abort":
            expected = expected[: len(sequence.answer)]
        assert sequence.answer == expected
        assert sequence.accepted <= sequence.drafted


def test_schedules_reach_what_they_are_for() -> None:
    """Preemption, prefix hits, drafts that stand and cut prompts happen in the schedules above."""
    prompts = [
        [*beginning(0)[:40], 1],
        [*beginning(0)[:40], 2],
        list(beginning(1)[:30]),
        list(beginning(0)[:50]),
    ]
    engine = Engine(
        model(),
        options=Options(draft_tokens=2, max_batch=4, max_batch_tokens=20, max_length=70, cache_tokens=16 * 8),
    )
    for prompt in prompts:
        engine.add_request(prompt, GREEDY)
    sequences = [sequence for request in engine.requests.values() for sequence in request]
    while engine.busy:
        engine.step()
    assert [s.answer for s in sequences] == [plain(tuple(prompt)) for prompt in prompts]
    assert engine.scheduler.preemptions > 0
    assert sum(s.cached_tokens or 0 for s in sequences) > 0
    assert 0 < engine.stats.acceptance < 1
    assert engine.stats.accepted_at[1] > 0


def test_the_last_one_let_in_gives_its_own_blocks_back() -> None:
    prompts = [beginning(0)[:47], beginning(1)[:24]]
    engine = Engine(model(), options=Options(max_length=64, cache_tokens=16 * 6))
    for prompt in prompts:
        engine.add_request(prompt, GREEDY)
    first, second = (sequence for request in engine.requests.values() for sequence in request)
    while engine.busy:
        engine.step()
        check_blocks(engine)
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert [first.answer, second.answer] == [plain(prompt) for prompt in prompts]


@torch.no_grad()
def reference_drafts(model: DeepSeekV3, tokens: list[int], count: int) -> list[int]:
    """Greedy drafts after ``tokens``, the MTP module reading everything anew for each."""
    ids = torch.tensor([tokens])
    states, _ = model.hidden_states(ids[:, :-1], mtp=False)
    hidden, following, found = states[0], ids[:, 1:], []
    for _ in range(count):
        context = model.context(torch.arange(hidden.shape[1]))
        state, _ = model.mtp_modules[0].predict(model.model.embed_tokens(following), hidden, context)
        found.append(int(model.lm_head(state[0, -1]).argmax()))
        hidden = torch.cat((hidden, state[:, -1:]), dim=1)
        following = torch.cat((following, torch.tensor([[found[-1]]])), dim=1)
    return found


@settings(max_examples=12)
@given(st.lists(st.integers(20, 50), min_size=2, max_size=4), st.integers(1, 3), st.integers(0, 20))
def test_drafts_are_those_of_the_module_read_anew(lengths: list[int], drafts: int, budget: int) -> None:
    """Over chunks, shared beginnings and preemption: the module's rows are always the ones it should see."""
    engine = Engine(
        model(),
        options=Options(
            draft_tokens=drafts,
            max_batch=4,
            max_batch_tokens=4 * (1 + drafts) + budget,
            max_length=70,
            cache_tokens=16 * 8,
        ),
    )
    for length in lengths:
        engine.add_request(beginning(0)[:length], replace(GREEDY, max_tokens=9))
    step = 0
    while engine.busy:
        engine.step()
        step += 1
        for sequence in engine.scheduler.running:
            if sequence.drafts and (step + sequence.arrival) % 3 == 0:
                assert sequence.drafts == reference_drafts(model(), sequence.tokens, len(sequence.drafts))


def test_answers_to_one_prompt_share_its_blocks() -> None:
    engine = Engine(model(), options=Options(cache_tokens=16 * 16, max_length=100))
    request = engine.add_request(beginning(0), replace(sampled(seed=3, max_tokens=8), n=4))
    sequences = engine.requests[request]
    while engine.busy:
        engine.step()
    assert len({tuple(s.answer) for s in sequences}) == 4
    assert [s.cached_tokens for s in sequences] == [0, 48, 48, 48]
    assert sequences[0].answer == alone(beginning(0), 3, 8, 0)
