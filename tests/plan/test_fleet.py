"""Fleets: the published day, terms by hand, and directions in which rates must move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.plan import fleet
from dsv3.plan.cost import calibrate
from dsv3.plan.fleet import Demand, Fleet, decode, prefill
from dsv3.plan.hardware import hardware
from dsv3.plan.memory import weight_bytes

V3, H800, DAY = ModelConfig.preset("v3-671b"), hardware("h800"), Demand()


@pytest.fixture(scope="module")
def efficiency() -> float:
    return calibrate()


def test_beside_the_published_rates(efficiency: float) -> None:
    """Estimates are above what is measured and below the bound; nothing is fitted to serving."""
    rows = fleet.published(efficiency)
    assert [row["published_tokens_per_s_node"] for row in rows[:2]] == [73_700, 14_800]
    for row in rows:
        assert row["published_tokens_per_s_node"] < row["estimate_tokens_per_s_node"]
        assert row["estimate_tokens_per_s_node"] <= row["bound_tokens_per_s_node"]
        assert 0.6 < row["published_over_estimate"] < 0.9


def test_deepseeks_day_needs_the_nodes_it_had(efficiency: float) -> None:
    """608B tokens in and 168B out at 73.7k and 14.8k a node are 226.9 nodes; it published 226.75."""
    found = fleet.summary(V3, H800, DAY, efficiency, Fleet(32), Fleet(144), None, False, 0.85)
    assert found["published_rates_nodes"] == pytest.approx(found["published_nodes"], rel=0.002)
    assert found["prefill"]["experts_per_gpu"] == 9 and found["decode"]["experts_per_gpu"] == 2
    assert 15 < found["decode"]["stream_tokens_per_s"] < 25  # published: 20 to 22


def test_decode_by_hand() -> None:
    """A step at peak: attention and matrices the longer of reading and products, then the network."""
    found = decode(V3, Fleet(144), H800, DAY, 1.0, batch=64)
    parts = weight_bytes(V3, "fp8")
    weights = sum(parts.values()) - parts["MTP"] - parts["routed experts"] * 254 / 256
    cache = 64 * 4989 * 70_272
    assert found.reading == pytest.approx((cache + weights) / 3.35e12)
    scores = 64 * 2 * 61 * 128 * (576 + 512) * 4989 / 989.4e12
    assert scores < found.products
    assert found.network == pytest.approx(64 * 58 * 8 * 17 / 18 * (7168 + 224 + 14336) / 45e9)
    step = max(max(scores, cache / 3.35e12) + max(found.products - scores, weights / 3.35e12), found.network)
    assert found.tokens_s_node == pytest.approx(8 * 64 / step)
    assert found.stream == pytest.approx(1 / step)


def test_rates_move_the_right_way(efficiency: float) -> None:
    base = prefill(V3, Fleet(32), H800, DAY, efficiency)
    assert prefill(V3, Fleet(32), H800, replace(DAY, hit=0), efficiency).tokens_s_node < base.tokens_s_node
    assert prefill(V3, Fleet(32), H800, DAY, 1.0).tokens_s_node > base.tokens_s_node
    few, many = (decode(V3, Fleet(144), H800, DAY, efficiency, batch=n) for n in (8, 128))
    assert few.stream > many.stream and few.tokens_s_node < many.tokens_s_node
    assert few.limit != many.limit
    drafting = decode(V3, Fleet(144), H800, DAY, efficiency, batch=8, mtp=True, acceptance=0.9)
    assert drafting.stream > few.stream  # a small batch waits for reading, which drafts share
    far = decode(V3, Fleet(144), H800, replace(DAY, context=50_000), efficiency)
    assert far.batch < many.batch


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: prefill(V3, Fleet(48, 30), H800, DAY, 1), "try --prefill-redundant 32"),
        (lambda: prefill(V3, Fleet(0), H800, DAY, 1), r"prefill-expert \(0\)"),
        (lambda: prefill(V3, Fleet(32), H800, replace(DAY, hit=1.0), 1), r"hit \(1.0\)"),
        (lambda: decode(V3, Fleet(144, 30), H800, DAY, 1), "try --decode-redundant 32"),
        (lambda: decode(V3, Fleet(8, 0), H800, DAY, 1), "no room"),
        (lambda: decode(V3, Fleet(144), H800, DAY, 1, batch=500), r"batch \(500\) must be 1 to 1"),
    ],
)
def test_impossible_fleets_are_refused(call: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()  # type: ignore[operator]
