"""The benchmark makes its own folder, runs both in turns and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv3.bench import convert
from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from tests.checkpoint.conftest import SMALL


def test_both_run_and_the_ratio_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "shape", lambda gigabytes: ModelConfig(**SMALL))
    result = convert.bench(tmp_path, rounds=3)
    speeds, peers = result["ours"], result["peers"]["copyfile"]
    for there, copied in (("bf16 to fp8", "copy bf16"), ("fp8 to bf16", "copy fp8")):
        ratio = speeds[f"{there}:gb_per_second"] / peers[f"{copied}:gb_per_second"]
        assert result["ratios"][f"copyfile:{there}"] == pytest.approx(ratio)
        assert speeds[f"{there}:gb_per_second"] == pytest.approx(sorted(result["all"][there])[1], abs=1e-3)
    assert "ratios (ours / theirs)" in convert.report(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gigabytes", [0.5, 1.0, 3.0])
def test_the_folder_has_the_size_asked_for(gigabytes: float) -> None:
    with torch.device("meta"):
        model = DeepSeekV3(convert.shape(gigabytes))
    assert sum(p.numel() for p in model.parameters()) * 2e-9 == pytest.approx(gigabytes, abs=0.2)
    with pytest.raises(UserError, match=r"--gigabytes \(0\.01\) is less than two layers; use 0\.54 or more"):
        convert.shape(0.01)
