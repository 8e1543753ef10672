"""An answer that moves from one engine to another goes on as if it had stayed."""

from __future__ import annotations

import socket
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.common.errors import Failure
from dsv3.serve.channel import Channel, Frame
from dsv3.serve.engine import Engine
from dsv3.serve.handover import Handover, from_wire, give, take, to_wire
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.serve.sequence import Sequence
from tests.model.build import tiny_model
from tests.serve.test_grammar import engine_of as constrained
from tests.serve.test_schedules import VOCAB, beginning, check_blocks, model

WISH = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, logprobs=2)


def engine(drafts: int = 0, kind: str = "float32", blocks: int = 16) -> Engine:
    return Engine(
        model(),
        options=Options(draft_tokens=drafts, cache_dtype=kind, cache_tokens=16 * blocks, max_length=80),
    )


@cache
def stayed(prompt: tuple[int, ...], params_seed: int | None, drafts: int, kind: str) -> Sequence:
    return run(engine(drafts, kind), list(prompt), wish(params_seed))


def wish(seed: int | None) -> SamplingParams:
    return WISH if seed is None else replace(WISH, temperature=0.9, top_p=0.95, min_p=0.01, seed=seed)


def run(one: Engine, prompt: list[int], params: SamplingParams) -> Sequence:
    (sequence,) = one.requests[one.add_request(prompt, params)]
    while one.busy:
        one.step()
    return sequence


def over_the_wire(handover: Handover) -> Handover:
    left, right = (Channel(end, "the other") for end in socket.socketpair())
    left.send(*to_wire(handover))
    frames: list[Frame] = []
    while not frames:
        left.flush()
        frames = right.receive()
    left.close()
    right.close()
    return from_wire(frames[0].message, frames[0].payload)


def step_until_it_answers(one: Engine, prompt: list[int], params: SamplingParams, steps: int) -> Sequence:
    """Its first token, and ``steps`` more."""
    (sequence,) = one.requests[one.add_request(prompt, params)]
    while len(sequence.tokens) == len(prompt):
        one.step()
    for _ in range(steps):
        if not sequence.finished:
            one.step()
    return sequence


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 50), st.none() | st.integers(0, 2), st.integers(0, 4)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2),
    st.sampled_from(["float32", "bfloat16", "fp8"]),
    st.booleans(),
)
def test_a_handover_changes_no_token(
    asks: list[tuple[int, int, int | None, int]], drafts: int, kind: str, crowded: bool
) -> None:
    """Whatever the prompts, the cache's format, the drafts and the moment; also where the second engine has
    little room, so that answers are given up there and computed again."""
    first, second = engine(drafts, kind), engine(drafts, kind, blocks=6 if crowded else 16)
    moving: list[tuple[Handover, str]] = []
    here: dict[str, Sequence] = {}
    for number, (start, length, seed, steps) in enumerate(asks):
        prompt = list(beginning(start)[:length])
        sequence = step_until_it_answers(first, prompt, wish(seed), steps)
        if sequence.finished:
            here[str(number)] = sequence
        else:
            moving.append((over_the_wire(take(first, sequence)), str(number)))
        assert first.blocks.used == 0 and not first.requests
        check_blocks(first)
    while moving or second.busy:
        if moving:
            sequence_there = give(second, *moving[0])
            if sequence_there is not None:
                here[moving.pop(0)[1]] = sequence_there
        second.step()
        check_blocks(second)
    assert second.blocks.used == 0
    for number, (start, length, seed, _) in enumerate(asks):
        expected, found = stayed(beginning(start)[:length], seed, drafts, kind), here[str(number)]
        assert found.answer == expected.answer
        assert found.finish_reason == expected.finish_reason
        torch.testing.assert_close(
            [one.logprob for one in found.logprobs], [one.logprob for one in expected.logprobs],
            rtol=0, atol=1e-4 if kind == "float32" else 0.3,
        )  # fmt: skip
        if len(asks) == 1 and not crowded:  # the same batches: not a bit differs
            assert found.logprobs == expected.logprobs
            assert (found.drafted, found.accepted) == (expected.drafted, expected.accepted)


def test_what_is_handed_over_is_found_again_by_others() -> None:
    """Its blocks carry their names, and the states at their ends, into the second engine."""
    first, second = engine(2), engine(2)
    prompt = list(beginning(0)[:50])
    give(second, over_the_wire(take(first, step_until_it_answers(first, prompt, WISH, 0))), "moved")
    while second.busy:
        second.step()
    cold = engine(2)
    again, fresh = (step_until_it_answers(one, prompt[:40], WISH, 0) for one in (second, cold))
    assert (again.cached_tokens, fresh.cached_tokens) == (32, 0)
    assert again.drafts == fresh.drafts
    rows = [one.cache.rows[:, s.slots[1:40]] for one, s in ((second, again), (cold, fresh))]
    torch.testing.assert_close(
        *rows
    )  # the MTP module's row of place 32 comes of a state that was handed over
    while second.busy or cold.busy:
        second.step(), cold.step()
    assert again.answer == fresh.answer
    assert (again.drafted, again.accepted) == (fresh.drafted, fresh.accepted)


def test_answers_of_one_request_are_taken_one_by_one() -> None:
    one, params = engine(1), replace(wish(3), n=3, max_tokens=6)
    request = one.add_request(list(beginning(0)[:40]), params)
    sequences, second = one.requests[request], engine(1)
    there: list[Sequence | None] = []
    while one.busy:
        one.step()
        for sequence in sequences:
            if sequence in one.scheduler.running and len(sequence.tokens) > 40 and not sequence.finished:
                there.append(give(second, over_the_wire(take(one, sequence)), str(sequence.index)))
    assert one.blocks.used == 0 and not one.requests
    while second.busy:
        second.step()
    together = engine(1)
    expected = together.requests[together.add_request(list(beginning(0)[:40]), params)]
    while together.busy:
        together.step()
    assert [found.answer for found in there if found] == [found.answer for found in expected]


def test_scores_of_the_prompt_travel() -> None:
    one, other, params = engine(), engine(), replace(WISH, prompt_logprobs=1)
    moved = give(other, over_the_wire(take(one, step_until_it_answers(one, [1, 2, 3], params, 0))), "moved")
    assert moved is not None and moved.prompt_logprobs == run(one, [1, 2, 3], params).prompt_logprobs
    assert moved.prompt_logprobs and moved.prompt_logprobs[0] is None and moved.prompt_logprobs[2]


def test_without_drafts_the_last_token_has_no_row_yet() -> None:
    """Nor a block, where the prompt fills its blocks."""
    one, other = engine(), engine()
    prompt = list(beginning(0)[:16])
    handover = over_the_wire(take(one, step_until_it_answers(one, prompt, WISH, 0)))
    assert handover.arrays["rows"].shape[1] == 16
    moved = give(other, handover, "moved")
    while other.busy:
        other.step()
    assert moved is not None and moved.answer == run(one, prompt, WISH).answer


def test_no_room_changes_nothing() -> None:
    first, second = engine(), engine(blocks=5)
    moved = [take(first, step_until_it_answers(first, list(beginning(n)[:40]), WISH, 0)) for n in (0, 1)]
    assert give(second, moved[0], "0") is not None
    assert give(second, moved[1], "1") is None
    assert list(second.requests) == ["0"] and second.blocks.used == 3
    check_blocks(second)
    while second.busy:
        second.step()
    assert give(second, moved[1], "1") is not None


def test_other_engines_are_refused() -> None:
    one = engine(1)
    handover = take(one, step_until_it_answers(one, [1, 2, 3], WISH, 0))
    for other, words in (
        (engine(0), "layers 3, and this engine has 2"),
        (engine(1, "bfloat16"), "cache float32, and this engine has bfloat16"),
        (Engine(tiny_model(seed=5, vocab_size=VOCAB, num_hidden_layers=2, num_nextn_predict_layers=1),
                options=one.options), "model"),
    ):  # fmt: skip
        with pytest.raises(Failure, match=words):
            give(other, handover, "x")
        assert not other.busy and other.blocks.used == 0
    message, parts = to_wire(handover)
    with pytest.raises(Failure, match="came with"):
        from_wire(message, memoryview(bytearray(b"".join(parts) + b"1234")))


def test_bytes_of_a_token() -> None:
    """DeepSeek-V3's, from the shapes that are handed over here."""
    one = engine(1, "bfloat16")
    handover = take(one, step_until_it_answers(one, list(beginning(0)[:32]), WISH, 0))
    layers, places, width = handover.arrays["rows"].shape
    assert (layers, places, width) == (2 + 1, 33, one.cache.latent + one.cache.rope)
    assert handover.arrays["ends"].shape == (2, model().config.hidden_size)
    assert handover.arrays["rows"].nbytes == 3 * 33 * width * 2
    assert 61 * (512 + 64) * 2 == 70_272 and 62 * 1152 + 7168 * 2 // 16 == 72_320


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_document_goes_on_under_its_schema(drafts: int) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}}, "required": ["a"]}
    params = SamplingParams(max_tokens=40, temperature=0, json_schema=schema)
    first, second, alone = (constrained(drafts) for _ in range(3))
    prompt = list(range(1, 20))
    wanted = run(alone, prompt, params)
    sequence = step_until_it_answers(first, prompt, params, 1)
    assert not sequence.finished
    moved = give(second, over_the_wire(take(first, sequence)), "moved")
    assert moved is not None
    while second.busy:
        second.step()
    assert moved.tokens == wanted.tokens and moved.finish_reason == wanted.finish_reason
    assert moved.text.text == wanted.text.text
