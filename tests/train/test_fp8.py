"""A run with ``precision: fp8``: it trains, resumes bit-equal, and stays near FP32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.hf import load
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.train import PretrainRecipe
from dsv3.quant.fp8 import FP8Experts
from dsv3.train.optimizer import AdamWBF16Moments
from dsv3.train.pretrain import pretrain
from dsv3.train.run import read_lines
from dsv3.train.stage import make_model


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def test_it_trains_beside_fp32(make_recipe: Any, tmp_path: Path) -> None:
    runs = [make_recipe(precision=kind, out=str(tmp_path / kind)) for kind in ("fp32", "fp8")]
    plain, fp8 = (losses(pretrain(recipe)) for recipe in runs)
    assert fp8 != plain and fp8[-1] < 0.9 * fp8[0]
    assert max(abs(a / b - 1) for a, b in zip(fp8, plain)) < 0.02


def test_resuming_is_bit_equal(make_recipe: Any, tmp_path: Path) -> None:
    whole = pretrain(make_recipe(precision="fp8", out=str(tmp_path / "whole")))
    half = make_recipe(precision="fp8", out=str(tmp_path / "half"))
    pretrain(half.model_copy(update={"total_tokens": half.total_tokens // 3, "schedule": half.schedule}))
    pretrain(half, "auto")
    assert losses(tmp_path / "half") == losses(whole)
    a, b = (load(folder / "model").state_dict() for folder in (whole, tmp_path / "half"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_moments_are_bf16_unless_asked_otherwise(make_recipe: Any) -> None:
    assert make_recipe(precision="fp8").optimizer.moments_in("fp8") == "bf16"
    assert make_recipe().optimizer.moments_in("fp32") == "fp32"
    asked = make_recipe(precision="fp8", optimizer={"lr": 1e-2, "moments": "fp32"})
    assert asked.optimizer.moments_in("fp8") == "fp32"


def test_the_optimizer_follows(make_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    step = AdamWBF16Moments.step
    monkeypatch.setattr(AdamWBF16Moments, "step", lambda self: made.append(self) or step(self))
    pretrain(make_recipe(precision="fp8", total_tokens=256))
    assert made and made[0].state_dict()["state"][0]["exp_avg"].dtype == torch.bfloat16


def test_every_choice_is_a_key(make_recipe: Any) -> None:
    recipe = make_recipe(precision="fp8", fp8={"gradient_tile": "128x128", "accumulation": "emulated"})
    model = make_model(recipe, torch.device("cpu"))
    experts = next(module for module in model.modules() if isinstance(module, FP8Experts))
    assert experts.recipe.section == recipe.fp8 and recipe.fp8.gradient_tile == "128x128"
    with pytest.raises(UserError, match=r"fp8\.gradient_tile.*7x7"):
        recipes.load(PretrainRecipe, Path("recipes/pretrain-tiny.yaml"), ["--fp8.gradient_tile", "7x7"])
