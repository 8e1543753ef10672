"""Redundant experts in a running engine: rows are dealt evenly, copies change nothing, loads are measured."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.evaluate.sample import generate
from dsv3.model import DeepSeekV3
from dsv3.model.moe import LocalDispatcher, Routing
from dsv3.ops.native import decode
from dsv3.quant.packed import Integers, pack
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options
from dsv3.serve.placement import Placement, imbalance
from dsv3.serve.replicas import Replicas, Spread
from dsv3.serve.sequence import Sequence
from tests.model.build import tiny_model
from tests.serve.test_schedules import GREEDY, VOCAB, Ask, asks, beginning, check_blocks, model

compiled = pytest.mark.skipif(
    not decode.usable(torch.ones(1)), reason="no compiler: BLAS rounds small groups of rows differently"
)
EXPERTS = 16


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_rows_are_dealt_to_the_slots_of_their_expert(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    rng = np.random.default_rng(tokens)
    slots_P = np.concatenate([rng.permutation(EXPERTS), rng.integers(EXPERTS, size=8)])
    placement = Placement.of(slots_P[None], EXPERTS)
    spread = Spread(EXPERTS, shards=4, half_life=64, device=torch.device("cpu"))
    spread.place(placement.logical_to_physical_LER[0], placement.counts_LE[0])
    total_P, load_E = np.zeros(24, dtype=int), np.zeros(EXPERTS)
    for _ in range(5):
        x = torch.randn(tokens, 6, generator=generator)
        scores = torch.rand(tokens, EXPERTS, generator=generator)
        gates, indices = scores.topk(3, dim=1)
        load = torch.bincount(indices.flatten(), minlength=EXPERTS)
        routing = Routing(indices, gates, scores)
        rows, counts, handle = spread.dispatch(x, routing, load)
        # An "expert" that marks its rows: what comes back must be of the right experts.
        owner = torch.from_numpy(slots_P).repeat_interleave(counts)
        assert torch.bincount(owner, minlength=EXPERTS).tolist() == load.tolist()
        local = LocalDispatcher()
        there, _, order = local.dispatch(x, routing, load)
        marks = torch.arange(EXPERTS).repeat_interleave(load)
        expected = local.combine(there * marks[:, None], routing, order)
        assert torch.equal(spread.combine(rows * owner[:, None], routing, handle), expected)
        total_P += counts.numpy()
        load_E = load_E * 0.5 ** (tokens / 64) + load.numpy()
    for expert in range(EXPERTS):  # in turn, also over steps: no slot has two rows more than another
        mine = total_P[slots_P == expert]
        assert mine.max() - mine.min() <= 1
    np.testing.assert_allclose(spread.load_E.numpy(), load_E)


@compiled
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_copy_multiplies_as_its_original_does(bits: int | None) -> None:
    """Bit for bit, whatever rows are beside it; random moves in between."""
    plain = tiny_model(num_hidden_layers=2)
    pack(plain, None if bits is None else Integers(bits, 32))
    engine = Engine(deepcopy(plain), options=Options(cache_tokens=64))
    replicas = Replicas(engine, slots=24, shards=4)
    moe, spread = plain.moe_layers()[1], engine.model.moe_layers()[1]
    rng, x = np.random.default_rng(0), torch.randn(50, 40)
    for tokens in (1, 2, 9, 50):
        extra = rng.integers(EXPERTS, size=8)
        replicas.put(rng.permutation(np.concatenate([np.arange(EXPERTS), extra]))[None])
        found = []
        for one in (moe, spread):
            routing, stats = one.route(x[None, :tokens])
            rows, counts, handle = one.dispatcher.dispatch(x[:tokens], routing, stats.load_E)
            found.append(one.dispatcher.combine(one.experts(rows, counts), routing, handle))
        assert torch.equal(*found) and found[0].abs().sum() > 0


def run(
    engine: Engine, wanted: list[Ask], replicas: Replicas | None, moves: dict[int, int]
) -> dict[int, Sequence]:
    """A schedule; at the steps of ``moves`` experts move, measured loads deciding or (odd seeds) nothing."""
    made: dict[int, Sequence] = {}
    step = 0
    while engine.busy or len(made) < len(wanted):
        for number, ask in enumerate(wanted):
            if ask.at == step:
                request = engine.add_request(ask.prompt, replace(ask.params, logprobs=3), str(number))
                (made[number],) = engine.requests[request]
            if ask.aborted is not None and step == ask.at + ask.aborted:
                engine.abort(str(number))
        if replicas is not None and step in moves:
            if moves[step] % 2:
                rng = np.random.default_rng(moves[step])
                slots = replicas.placement.physical_to_logical_LP.shape[1]
                every = [
                    rng.permutation([*range(EXPERTS), *rng.integers(EXPERTS, size=slots - EXPERTS)])
                    for _ in replicas.layers
                ]
                replicas.put(np.stack(every))
            else:
                replicas.rebalance()
        engine.step()
        check_blocks(engine)
        step += 1
    return made


@compiled
@settings(max_examples=15)
@given(
    st.lists(asks, min_size=1, max_size=5),
    st.integers(0, 2),
    st.integers(0, 60),
    st.integers(6, 12),
    st.dictionaries(st.integers(1, 15), st.integers(0, 9), min_size=1, max_size=5),
)
def test_moving_and_copying_experts_changes_no_token(
    wanted: list[Ask], drafts: int, budget: int, blocks: int, moves: dict[int, int]
) -> None:
    """Nor a bit of a probability: the same schedule with one slot an expert, and with replicas that move."""
    options = Options(
        draft_tokens=drafts,
        max_batch=4,
        max_batch_tokens=4 * (1 + drafts) + budget,
        max_length=70,
        cache_tokens=16 * blocks,
    )
    still, moving = (Engine(deepcopy(model()), options=options) for _ in range(2))
    Replicas(still, slots=EXPERTS, shards=1)
    expected = run(still, wanted, None, {})
    found = run(moving, wanted, Replicas(moving, slots=24, shards=4), moves)
    for number, sequence in found.items():
        assert sequence.answer == expected[number].answer
        assert sequence.logprobs == expected[number].logprobs
        assert sequence.finish_reason == expected[number].finish_reason
    greedy = {n: s for n, s in found.items() if wanted[n].seed is None and s.finish_reason != "abort"}
    for number, sequence in greedy.items():  # and a model without any of this says the same
        prompt = list(wanted[number].prompt)
        assert sequence.answer == generate(model(), prompt, wanted[number].max_tokens)


def skewed() -> DeepSeekV3:
    """Two experts that most tokens choose."""
    skewed = deepcopy(model())
    for moe in skewed.moe_layers().values():
        moe.gate.e_score_correction_bias[[1, 6]] += 3
    return skewed


def busy_with(engine: Engine) -> None:
    for number in range(6):
        engine.add_request(list(beginning(number)), GREEDY)
    while engine.busy:
        engine.step()


def test_replicas_even_a_skewed_load() -> None:
    engine = Engine(skewed(), options=Options(cache_tokens=512, draft_tokens=1))
    replicas = Replicas(engine, slots=24, shards=4)
    assert engine.runner.layers.compiled is None  # which knows no slots
    busy_with(engine)
    before = replicas.imbalance()
    load_LE = replicas.loads()
    assert load_LE.shape == (2, EXPERTS) and set(load_LE[0].argsort()[-2:]) == {1, 6}
    moved = replicas.rebalance()
    assert moved.after < 0.8 * moved.before and moved.slots > 0
    (moe, _) = replicas.layers.values()
    assert moved.nbytes == moved.slots * 3 * 40 * 24 * 4
    assert (replicas.placement.counts_LE[0, [1, 6]] > 1).all()
    assert np.isnan(replicas.imbalance()).all()
    engine.forget()
    busy_with(engine)
    assert (replicas.imbalance() < 0.8 * before).all()
    assert moe.experts.gate_proj.weight.shape[0] == 24


def test_what_is_as_good_already_stays() -> None:
    engine = Engine(skewed(), options=Options(cache_tokens=512))
    replicas = Replicas(engine, slots=24, shards=4)
    busy_with(engine)
    replicas.rebalance()
    placed = replicas.placement.physical_to_logical_LP.copy()
    again = replicas.rebalance()  # by the same loads
    assert (again.slots, again.nbytes) == (0, 0) and again.after == again.before
    replicas.put(placed.reshape(2, 4, 6)[:, :, ::-1].reshape(2, 24))  # another order in the same shards
    assert (replicas.placement.physical_to_logical_LP == placed).all()


def test_a_placement_better_than_the_new_one_stays() -> None:
    """The greedy choice is not the best: a swap that improves it must not be undone."""
    engine = Engine(deepcopy(model()), options=Options(cache_tokens=64))
    replicas = Replicas(engine, slots=24, shards=4)
    load_LE = np.tile(np.random.default_rng(10).lognormal(size=EXPERTS), (2, 1))
    for dispatcher, load_E in zip(replicas.dispatchers, load_LE):
        dispatcher.load_E.copy_(torch.from_numpy(load_E))
    first = replicas.rebalance()
    slots_LP, best = replicas.placement.physical_to_logical_LP.copy(), first.after
    for a, b in combinations(range(24), 2):
        swapped = slots_LP.copy()
        swapped[:, [a, b]] = swapped[:, [b, a]]
        even = imbalance(Placement.of(swapped, EXPERTS).gpu_loads(load_LE, 4)).mean()
        if even < best:
            best = even
            replicas.put(swapped)
    assert best < first.after - 0.001
    again = replicas.rebalance()
    assert again.slots == 0 and again.before == again.after == pytest.approx(best)


def test_mistakes_are_refused() -> None:
    engine = Engine(deepcopy(model()), options=Options(cache_tokens=64))
    for changes, words in (
        (dict(slots=20, shards=3), r"gpus \(3\) must divide slots \(20\)"),
        (dict(slots=12, shards=4), r"slots \(12\) must hold every expert"),
        (dict(slots=16, shards=4, half_life=0), r"half_life \(0\)"),
    ):
        with pytest.raises(UserError, match=words):
            Replicas(engine, **changes)
        assert all(type(moe.dispatcher) is LocalDispatcher for moe in engine.model.moe_layers().values())
    dense = tiny_model(vocab_size=VOCAB, num_hidden_layers=1)
    with pytest.raises(UserError, match="dense layers only"):
        Replicas(Engine(dense, options=Options(cache_tokens=64)), slots=16, shards=1)
