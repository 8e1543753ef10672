"""Where a model is cut: every piece once, ranks with equal work, costs that agree with the plan's."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from dsv3.parallel.pipeline.cut import SCHEDULES, V_SHAPED, costs, cut, stages_of
from dsv3.plan.params import train_flops_per_token


@pytest.mark.parametrize("mtp", [True, False])
def test_costs_are_the_plans_flops(mtp: bool) -> None:
    config = ModelConfig.preset("v3-671b")
    with torch.device("meta"):
        model = DeepSeekV3(config)
    found = costs(model, 4096, mtp)
    assert sum(found) == train_flops_per_token(config, 4096, mtp)
    assert found[0] == 0 and len(found) == 61 + 2
    assert found[1] == found[3] != found[4] == found[61]


def measure(ranges: list[range], cost: list[int], schedule: str, ranks: int) -> tuple[int, int]:
    """In a V the heaviest rank's cost and the stages' squares; else the heaviest stage's."""
    stages = [sum(cost[piece] for piece in pieces) for pieces in ranges]
    if schedule not in V_SHAPED:
        return max(stages), 0
    heaviest = max(sum(stages[s] for s in stages_of(schedule, rank, ranks)) for rank in range(ranks))
    return heaviest, sum(stage**2 for stage in stages)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_cut_is_better(data: st.DataObject) -> None:
    """Against all cuts there are."""
    schedule = data.draw(st.sampled_from(SCHEDULES))
    ranks = data.draw(st.integers(1, 3))
    stages = sum(len(stages_of(schedule, rank, ranks)) for rank in range(ranks))
    cost = data.draw(st.lists(st.integers(0, 20), min_size=stages, max_size=9).map(list))
    found = cut(cost, schedule, ranks)
    assert [piece for pieces in found for piece in pieces] == list(range(len(cost)))
    assert len(found) == stages and all(found)
    every = []
    for inner in combinations(range(1, len(cost)), stages - 1):
        ranges = [range(a, b) for a, b in pairwise([0, *inner, len(cost)])]
        every.append(measure(ranges, cost, schedule, ranks))
    assert measure(found, cost, schedule, ranks) == min(every)


def test_the_released_model_on_sixteen_ranks() -> None:
    """61 layers do not divide: rank 0 has the end (two heads and a module: 3.9 layers' work) and a layer."""
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig.preset("v3-671b"))
    cost = costs(model, 4096)
    ranges = cut(cost, "dualpipev", 16)
    layers = [
        sum(1 <= piece <= 61 for s in stages_of("dualpipev", r, 16) for piece in ranges[s]) for r in range(16)
    ]
    assert layers == [1] + [4] * 15
    assert [len(pieces) for pieces in ranges[1:-1]] == [2] * 30
    assert stages_of("dualpipev", 0, 16) == (0, 31) and 62 in ranges[31]
    heaviest, _ = measure(ranges, cost, "dualpipev", 16)
    assert 1.21 < heaviest / (sum(cost) / 16) < 1.22


def test_too_many_stages_and_unknown_schedules_are_refused() -> None:
    with pytest.raises(UserError, match=r"pipeline \(4\) with schedule dualpipev needs 8 stages.*5 pieces"):
        cut([0, 1, 1, 1, 1], "dualpipev", 4)
    with pytest.raises(UserError, match=r"schedule \(dualpipe\) is unknown.*dualpipev"):
        stages_of("dualpipe", 0, 2)
