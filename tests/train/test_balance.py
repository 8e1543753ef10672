"""The balancing rule: once a step, from the whole batch, however the batch is cut (report 2.1.2)."""

from __future__ import annotations

import pytest
import torch

from dsv3.config.model import ModelConfig
from dsv3.data.loader import Batch
from dsv3.model import DeepSeekV3
from dsv3.model.moe import RouterStats
from dsv3.train import recompute
from dsv3.train.balance import Balancer, max_violation
from dsv3.train.objective import Share, language_loss
from tests.train.conftest import MODEL

TOKENS = torch.randint(0, 384, (8, 34), generator=torch.Generator().manual_seed(1))


def biases_after_a_step(micro: int, what: str = "none") -> dict[int, torch.Tensor]:
    """Expert biases by layer after one forward and backward of 8 sequences in pieces of ``micro``."""
    model = DeepSeekV3(ModelConfig(**MODEL), seed=3)
    recompute.apply(model, what)  # type: ignore[arg-type]
    balancer = Balancer(model.moe_layers())
    for start in range(0, 8, micro):
        rows = TOKENS[start : start + micro]
        loss, parts = language_loss(model, Batch(rows), 32, Share([256, 256], 8), 0.3)
        loss.backward()
        balancer.add(parts.router)
    assert all(sum(load.tolist()) == 8 * 32 * 2 for load in balancer.load.values())
    balancer.update(0.01)
    return {i: moe.gate.e_score_correction_bias.clone() for i, moe in model.moe_layers().items()}


@pytest.fixture(scope="module")
def whole() -> dict[int, torch.Tensor]:
    return biases_after_a_step(8)


def test_every_expert_layer_moves_the_mtp_modules_too(whole: dict[int, torch.Tensor]) -> None:
    assert sorted(whole) == [1, 2, 3]  # layer 0 is dense, 3 is the MTP module
    for bias in whole.values():
        assert all(x in (0.0, pytest.approx(0.01)) for x in bias.abs().tolist())
        assert bias.abs().max() > 0


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("what", ["none", "report", "layer"])
def test_the_same_in_pieces_and_recomputed(whole: dict[int, torch.Tensor], micro: int, what: str) -> None:
    for layer, bias in biases_after_a_step(micro, what).items():
        assert torch.equal(bias, whole[layer])


def test_overloaded_experts_lose_and_idle_ones_gain() -> None:
    model = DeepSeekV3(ModelConfig(**MODEL))
    balancer = Balancer(model.moe_layers())
    load = torch.tensor([0, 1, 2, 3, 4, 2, 2, 2])  # mean 2
    balancer.add({1: RouterStats(load, None)})
    balancer.update(0.5)
    bias = model.moe_layers()[1].gate.e_score_correction_bias
    assert bias.tolist() == [0.5, 0.5, 0, -0.5, -0.5, 0, 0, 0]
    assert balancer.take() == {1: load.tolist()}
    assert balancer.load == {}


def test_max_violation() -> None:
    assert max_violation([2, 2, 2, 2]) == 0
    assert max_violation([6, 2, 0, 0]) == 2
    assert max_violation([0, 0]) == 0
