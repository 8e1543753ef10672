"""The schedules against the report's table (4.2)."""

from __future__ import annotations

import math

import pytest

from dsv3.common.errors import UserError
from dsv3.config.recipe import load
from dsv3.config.train import PretrainRecipe, Segment
from dsv3.train.schedules import Extent, Schedules, factor

T, B = 1e12, 1e9


def schedules_of(path: str) -> Schedules:
    recipe = load(PretrainRecipe, path)
    return Schedules(recipe, Extent("tokens", recipe.total_tokens, recipe.sequence_length))


@pytest.fixture(scope="module")
def real() -> Schedules:
    return schedules_of("recipes/pretrain-v3-671b.yaml")


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0.1 * T, 2.2e-4),
        (9.999 * T, 2.2e-4),
        (10 * T + 4.3 * T / 2, (2.2e-4 + 2.2e-5) / 2),  # the cosine's middle
        (10 * T + 4.3 * T / 4, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2),
        (14.3 * T, 2.2e-5),
        (14.632 * T, 2.2e-5),
        (14.634 * T, 7.3e-6),
        (14.799 * T, 7.3e-6),
    ],
)
def test_learning_rate_of_the_report(real: Schedules, tokens: float, rate: float) -> None:
    assert real.learning_rate(tokens) == pytest.approx(rate, rel=1e-9)


def test_warm_up_takes_two_thousand_steps(real: Schedules) -> None:
    tokens, rates = 0, []
    for _ in range(2000):
        rates.append(real.learning_rate(tokens))
        tokens += real.sequences(tokens) * 4096
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(2.2e-4 / 2000, rel=0.15)  # the ramp's steps are smaller at first
    assert rates[-2] < 2.2e-4 * (1 - 1e-4)
    assert rates[-1] == pytest.approx(2.2e-4, rel=1e-4)  # a step's rate is that of its end


@pytest.mark.parametrize(
    ("tokens", "sequences"),
    [(0, 3072), (234.5 * B, 9216), (468.9 * B, 15232), (469 * B, 15360), (14.7 * T, 15360)],
)
def test_batch_ramp_of_the_report(real: Schedules, tokens: float, sequences: int) -> None:
    assert real.sequences(tokens) == sequences


def test_a_ramp_within_a_micro_batch_goes_by_halves() -> None:
    """8 of 16, then 16: batches that 2, 4 or 8 ranks share."""
    schedules = schedules_of("recipes/pretrain-tiny.yaml")
    end = 0.1 * schedules.extent.total
    assert [schedules.sequences(share * end) for share in (0, 0.5, 0.99, 1, 5)] == [8, 8, 8, 16, 16]


def test_gamma_and_lambda_of_the_report(real: Schedules) -> None:
    assert [real.gamma(x * T) for x in (0, 14.29, 14.31, 14.79)] == [0.001, 0.001, 0, 0]
    assert [real.mtp_weight(x * T) for x in (0, 9.99)] == [0.3, 0.3]
    assert [real.mtp_weight(x * T) for x in (10.01, 14.79)] == pytest.approx([0.1, 0.1])


def test_steps_counts_the_loop() -> None:
    schedules = schedules_of("recipes/pretrain-tiny.yaml")
    tokens = count = 0
    while tokens < schedules.extent.total:
        tokens += schedules.sequences(tokens) * schedules.recipe.sequence_length
        count += 1
    assert schedules.steps() == count


def test_pieces_join() -> None:
    pieces = (
        Segment(until=1, to=1, shape="linear"),
        Segment(until=3, to=0.5, shape="cosine"),
        Segment(until=4, to=0.2),
    )
    assert [factor(pieces, x) for x in (0, 0.5, 1, 2, 3, 3.9, 4, 9)] == pytest.approx(
        [0, 0.5, 1, 0.75, 0.2, 0.2, 0.2, 0.2]
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schedule.gamma", "[{until: 0.5, to: 1}]", "schedule.gamma ends at 0.5"),
        ("schedule.mtp", "[{until: 0.5, to: 1}, {until: 0.2, to: 1}, {until: 1, to: 0}]", "must not fall"),
        ("schedule.batch", "[]", "schedule.batch is empty"),
        ("batch.micro_sequences", "3", "must divide batch.sequences"),
        ("sequence_length", "99999", "exceeds model.max_position_embeddings"),
        ("optimizer.learning_rate", "1", "did you mean optimizer.lr"),
    ],
)
def test_bad_recipes_are_refused(key: str, value: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(PretrainRecipe, "recipes/pretrain-tiny.yaml", [f"--{key}", value])
