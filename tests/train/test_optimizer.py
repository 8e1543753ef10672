"""AdamW, its moments in BF16, clipping, and what a checkpoint keeps of it."""

from __future__ import annotations

import pytest
import torch

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.config.train import OptimizerSection
from dsv3.model import DeepSeekV3
from dsv3.parallel.weights import Weights
from dsv3.train.optimizer import build, clip_gradients, load_state_tensors, state_tensors
from tests.train.conftest import MODEL


def model_with_gradients(seed: int = 0) -> DeepSeekV3:
    model = DeepSeekV3(ModelConfig(**MODEL), seed=seed)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def train(moments: str, steps: int = 5) -> dict[str, torch.Tensor]:
    model = model_with_gradients()
    optimizer = build(model, OptimizerSection(lr=1e-2, moments=moments))
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad.mul_(1 + 0.1 * step)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_bf16_moments_follow_fp32_ones() -> None:
    start = dict(model_with_gradients().named_parameters())
    exact, rounded = train("fp32"), train("bf16")
    for name, value in exact.items():
        moved = (value - start[name]).norm()
        assert (rounded[name] - value).norm() < 0.01 * moved, name


def test_one_step_with_bf16_moments_is_the_textbooks() -> None:
    model = model_with_gradients()
    before = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    build(model, OptimizerSection(lr=1e-2, moments="bf16", weight_decay=0.1)).step()
    for name, p in model.named_parameters():
        decay = 0.1 if p.dim() > 1 else 0.0
        update = p.grad.double() / (p.grad.double().abs() + 1e-8)  # first step: m / sqrt(v) is the sign
        wanted = before[name] * (1 - 1e-2 * decay) - 1e-2 * update
        torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-5, atol=1e-6)


def test_norms_do_not_decay() -> None:
    model = DeepSeekV3(ModelConfig(**MODEL))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build(model, OptimizerSection(lr=0.1, weight_decay=0.5)).step()
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    fresh = DeepSeekV3(ModelConfig(**MODEL))
    assert torch.allclose(model.lm_head.weight, fresh.lm_head.weight * 0.95)


@pytest.mark.parametrize("limit", [1e9, 0.5])
def test_clip_agrees_with_torch(limit: float) -> None:
    ours, theirs = model_with_gradients(), model_with_gradients()
    norm = clip_gradients(Weights(ours), limit)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)


def test_a_norm_that_is_not_finite_scales_nothing() -> None:
    model = model_with_gradients()
    model.lm_head.weight.grad[0, 0] = float("nan")
    kept = model.model.norm.weight.grad.clone()
    assert not clip_gradients(Weights(model), 0.1) < float("inf")
    assert torch.equal(model.model.norm.weight.grad, kept)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_state_goes_through_a_checkpoint(moments: str) -> None:
    options = OptimizerSection(lr=1e-2, moments=moments)
    whole, first, second = (model_with_gradients() for _ in range(3))
    one = build(whole, options)
    one.step()
    one.step()
    before = build(first, options)
    before.step()
    second.load_state_dict(first.state_dict())
    after = build(second, options)
    load_state_tensors(after, second, state_tensors(before, first))
    after.step()
    for a, b in zip(whole.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_the_other_dtype_of_moments_is_refused() -> None:
    model = model_with_gradients()
    optimizer = build(model, OptimizerSection(moments="bf16"))
    optimizer.step()
    other = build(model, OptimizerSection(moments="fp32"))
    with pytest.raises(UserError, match="moments bf16"):
        load_state_tensors(other, model, state_tensors(optimizer, model))
