"""The figures are of what they say: DeepSeek-V3's bytes a token, answers that stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dsv3
from dsv3.bench import deployment
from dsv3.cli.main import app
from dsv3.common.errors import UserError
from dsv3.data.tokenizer import train
from tests.model.build import tiny_model


def test_handover_of_the_real_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "REPEATS", 1)
    shown = CliRunner().invoke(app, ["bench", "deployment", "--tokens", "16", "--json"])
    found = json.loads(shown.stdout)
    handed = found["ours"]["handover"]
    assert (handed["tokens"], handed["bytes_per_token"]) == (17, 70_272)
    assert handed["bytes_per_token_with_mtp"] == 71_424
    rates = handed["gigabytes_per_second"]
    assert rates["handover"] < min(rates["take"], rates["send and receive"], rates["give"])
    assert found["ratios"]["memcpy:handover"] == pytest.approx(rates["handover"] / rates["memcpy"])
    assert "70,272 bytes a token" in deployment.report(found)


def test_experts_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "PROMPTS", 16)
    tokenizer = train(["def add(a, b):\n    return a + b\n"] * 20, 300)
    dsv3.save(tiny_model(vocab_size=tokenizer.vocab_size), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    found = deployment.experts(tmp_path / "model", slots=20, shards=4)
    even = found["imbalance"]
    assert even["placed, with replicas"] < even["as they come"] and even["placed"] >= 1
    assert found["same_answers"] and found["moved_slots"] > 0
    with pytest.raises(
        UserError, match=r"--slots \(20\) must be at least the 16 experts, and --shards \(3\)"
    ):
        deployment.bench(16, tmp_path / "model", 0, 3)
    with pytest.raises(UserError, match="tokenizer"):
        deployment.bench(16, tmp_path)
