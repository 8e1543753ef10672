"""The benchmark runs both contestants on the same shape and tells the ratio of what it measured."""

from __future__ import annotations

import pytest

from dsv3.bench import train
from tests.train.conftest import MODEL


def test_both_run_and_the_ratio_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {**MODEL, "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.0}
    small = {"device": "cpu", "precision": "fp32", "sequences": 2, "length": 16, "model": model}
    monkeypatch.setitem(train.CASES, "small", small)
    result = train.bench("small", ["transformers:eager"], steps=3, warmup=1, threads=1)
    ours, theirs = result["ours"], result["peers"]["transformers:eager"]
    assert len(ours["step_seconds"]) == len(theirs["step_seconds"]) == 3
    speed = result["ratios"]["transformers:eager:tokens_per_second"]
    assert speed == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    assert result["ratios"]["transformers:eager:peak_memory"] > 0
    assert "ratios (ours / theirs)" in train.report(result)
    assert result["machine"]["torch"]


def test_a_peer_that_stops_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "device": "cpu",
        "precision": "fp32",
        "sequences": 2,
        "length": 16,
        "model": {"hidden_size": -1},
    }
    monkeypatch.setitem(train.CASES, "broken", broken)
    with pytest.raises(train.Failure, match=r"ours stopped: .*hidden_size"):
        train.bench("broken", [], steps=1)
