"""Expert placement: EPLB's published example, and what holds of any placement."""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.serve.placement import Placement, imbalance, pack, place, replicate

weights = st.one_of(st.integers(1, 200), st.floats(0.01, 10)).map(float)


def test_the_published_example() -> None:
    """Of the EPLB repository's README: the hierarchical policy on 2 nodes of 4 GPUs."""
    load = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    placement = place(load, slots=16, groups=4, nodes=2, gpus=8)
    assert placement.physical_to_logical_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert placement.counts_LE[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placement.logical_to_physical_LER[0, 5].tolist() == [0, 2]
    assert placement.logical_to_physical_LER[0, 6].tolist() == [1, -1]
    everywhere = place(load, slots=16, groups=3, nodes=2, gpus=8)  # the global policy: 3 groups, 2 nodes
    found = imbalance(everywhere.gpu_loads(load, 8))
    assert (found < imbalance(placement.gpu_loads(load, 8))).all()


@given(st.data())
def test_any_placement(data: st.DataObject) -> None:
    nodes, per_node, per_group = (data.draw(st.integers(1, 3)) for _ in range(3))
    groups, gpus = data.draw(st.integers(1, 6)), nodes * per_node
    experts = groups * per_group
    slots = gpus * data.draw(st.integers(-(-experts // gpus), -(-experts // gpus) + 3))
    load = np.array(data.draw(st.lists(st.lists(weights | st.just(0.0), min_size=experts, max_size=experts),
                                       min_size=1, max_size=2)))  # fmt: skip
    placement = place(load, slots, groups, nodes, gpus)
    assert placement.physical_to_logical_LP.shape == (len(load), slots)
    assert (placement.counts_LE >= 1).all() and (placement.counts_LE.sum(axis=1) == slots).all()
    for layer, slots_P in enumerate(placement.physical_to_logical_LP.tolist()):
        for expert, where in enumerate(placement.logical_to_physical_LER[layer].tolist()):
            mine = [slot for slot, owner in enumerate(slots_P) if owner == expert]
            assert where == mine + [-1] * (len(where) - len(mine))
            assert len(mine) == placement.counts_LE[layer, expert]
        if groups % nodes == 0:  # a group stays inside one node, and so do all its replicas
            homes = {(owner // per_group, slot // (slots // nodes)) for slot, owner in enumerate(slots_P)}
            assert len(homes) == groups
    np.testing.assert_allclose(placement.gpu_loads(load, gpus).sum(axis=1), load.sum(axis=1))


@given(st.lists(weights, min_size=1, max_size=5), st.integers(0, 4))
def test_no_choice_of_replicas_is_better(loads: list[float], spare: int) -> None:
    """Against all choices of counts: the busiest replica is as little busy as can be."""
    owners, shares = replicate(loads, len(loads) + spare)
    assert owners[: len(loads)] == list(range(len(loads)))
    best = min(
        max(load / (1 + extra.count(number)) for number, load in enumerate(loads))
        for extra in combinations_with_replacement(range(len(loads)), spare)
    )
    assert max(shares) == best <= max(loads)


def best_packing(values: list[float], packs: int) -> float:
    """The least possible load of the heaviest pack."""
    if packs == 1:
        return sum(values)
    first, rest, room = values[0], range(1, len(values)), len(values) // packs
    found = float("inf")
    for others in combinations(rest, room - 1):
        load = first + sum(values[number] for number in others)
        left = [values[number] for number in rest if number not in others]
        found = min(found, max(load, best_packing(left, packs - 1)))
    return found


@given(st.sampled_from([(2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2)]), st.data())
def test_packing_beside_the_optimum(shape: tuple[int, int], data: st.DataObject) -> None:
    """Two items a pack: the optimum. More: within LPT's bound of 4/3 - 1/(3 packs) (Graham 1969)."""
    packs, room = shape
    values = data.draw(st.lists(weights, min_size=packs * room, max_size=packs * room))
    members = pack(values, packs)
    assert sorted(item for one in members for item in one) == list(range(packs * room))
    assert {len(one) for one in members} == {room}
    heaviest = max(sum(values[item] for item in one) for one in members)
    bound = 1.0 if room == 2 else 4 / 3 - 1 / (3 * packs)
    assert heaviest <= best_packing(values, packs) * bound * (1 + 1e-12)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 1.5]), st.booleans())
def test_replicas_even_out_skewed_loads(seed: int, skew: float, hierarchical: bool) -> None:
    """Of the size and skew of real layers: as even as without replicas or more, but for 2 % of the mean.

    (Packing is greedy, so 64 even experts may pack better than 80 replicas. ``replicas.rebalance`` therefore
    keeps a placement that is better than the new one.) One expert that is too heavy needs its replicas.
    """
    load = np.random.default_rng(seed).lognormal(sigma=skew, size=(1, 64))
    groups, nodes = (8, 2) if hierarchical else (1, 1)
    plain = load.reshape(8, -1).sum(axis=1)[None]
    without = place(load, 64, groups, nodes, 8).gpu_loads(load, 8)
    spread = place(load, 80, groups, nodes, 8).gpu_loads(load, 8)
    assert imbalance(spread) <= imbalance(without) + 0.02 and imbalance(without) <= imbalance(plain)
    load[0, 5] = load.sum()
    without = place(load, 64, groups, nodes, 8).gpu_loads(load, 8)
    spread = place(load, 80, groups, nodes, 8).gpu_loads(load, 8)
    assert imbalance(spread) < 0.6 * imbalance(without)


def test_bad_sizes_are_refused() -> None:
    load = np.ones((1, 8))
    for changes, words in (
        (dict(slots=6), r"slots \(6\) must hold every expert: at least 8"),
        (dict(slots=10), r"gpus \(4\) must divide slots \(10\)"),
        (dict(nodes=3), r"nodes \(3\) must divide gpus \(4\)"),
        (dict(groups=3), r"groups \(3\) must divide experts \(8\)"),
        (dict(gpus=0), r"gpus \(0\) must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            place(load, **{**dict(slots=8, groups=4, nodes=2, gpus=4), **changes})
    with pytest.raises(UserError, match="finite"):
        place(np.full((1, 8), np.nan), 8, 4, 2, 4)
    assert imbalance(Placement.of(np.arange(8)[None], 8).gpu_loads(0 * load, 4)) == 1
