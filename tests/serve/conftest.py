"""Tiny models for the engine, with random weights everywhere and logits well apart."""

from __future__ import annotations

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
