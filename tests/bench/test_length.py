"""Memory against length: the exponent of known growth, and that a step's memory has no quadratic part."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3.bench.length import bench, draw, fit, report
from dsv3.common.errors import UserError
from tests.train.conftest import MODEL


@pytest.mark.parametrize("power", [1, 1.5, 2])
def test_the_exponent_is_that_of_the_growth(power: float) -> None:
    found = fit({t: 10**9 + int(300 * t**power) for t in (256, 512, 1024, 4096)})
    assert found["exponent"] == pytest.approx(power, abs=0.011)
    assert found["base"] == pytest.approx(10**9, rel=0.01)


@pytest.mark.slow
def test_a_step_is_linear_in_its_length(tmp_path: Path) -> None:
    model = {**MODEL, "hidden_size": 128, "num_attention_heads": 8, "num_nextn_predict_layers": 0}
    result = bench([1024, 2048, 3072, 4096], model, ["none"], threads=1)
    # Scores of T x T would be 512 MiB a layer at 4096 and give an exponent near 2.
    assert result["fits"]["none"]["exponent"] < 1.35, result
    assert "exponent" in report(result) and "4096 tokens" in report(result)
    draw(result, tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size > 5000


def test_too_few_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="four or more"):
        bench([1024, 2048])
