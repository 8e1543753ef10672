"""Tiny models for the engine, with random weights everywhere and logits well apart."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from dsv3.model import DeepSeekV3
from tests.model.build import tiny_model


@pytest.fixture(scope="session")
def model() -> DeepSeekV3:
    """Three layers and an MTP module."""
    return tiny_model(num_nextn_predict_layers=1)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the rounding of FP32 sums in another order."""
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


def surprise(counts: Counter[tuple[int, ...]], wanted: dict[tuple[int, ...], float]) -> float:
    """Chi-squared in standard deviations above its mean; rare outcomes are counted together."""
    total = sum(counts.values())
    cells = [(counts[key], share * total) for key, share in wanted.items() if share * total >= 5]
    seen, expected = (sum(column) for column in zip(*cells))
    if total - expected > 1:
        cells.append((total - seen, total - expected))
    else:
        assert seen == total, "something impossible was drawn"
    chi = sum((found - hoped) ** 2 / hoped for found, hoped in cells)
    return (chi - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))
