"""Advantages and losses against a slow reading of the formulas in float64, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config.grpo import PRESETS, PolicySection
from dsv3.config.recipe import validate
from dsv3.train.grpo.losses import Whole, advantages, deviation, policy_loss, without_signal

LENGTHS = [3, 1, 5, 4]


def numbers(seed: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    logp, old, reference, drift = (
        -torch.rand(4, 5, generator=draw, dtype=torch.float64) * 2 for _ in range(4)
    )
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return logp, old, reference, drift + 1, mask, torch.tensor([1.5, -0.5, -1.0, 0.0], dtype=torch.float64)


def slow_loss(policy: PolicySection, logp, old, reference, drift, advantages_S, longest: int) -> float:
    answers = []
    for s, length in enumerate(LENGTHS):
        advantage = float(advantages_S[s])
        mean = sum(float(logp[s, t] - old[s, t]) for t in range(length)) / length
        gone = (
            policy.off_policy is not None
            and advantage < 0
            and sum(float(drift[s, t]) for t in range(length)) / length > policy.off_policy
        )
        tokens = []
        for t in range(length):
            ratio = math.exp(mean if policy.ratio == "sequence" else float(logp[s, t] - old[s, t]))
            clipped = min(max(ratio, 1 - policy.epsilon_low), 1 + policy.epsilon_high)
            loss = 0.0 if gone else -min(ratio * advantage, clipped * advantage)
            apart = float(reference[s, t] - logp[s, t])
            kl = math.exp(apart) - apart - 1
            tokens.append(loss + policy.beta * kl * (ratio if policy.unbiased_kl else 1))
        answers.append(tokens)
    if policy.average == "sequence":
        return sum(sum(tokens) / len(tokens) for tokens in answers) / len(answers)
    total = sum(sum(tokens) for tokens in answers)
    return total / (sum(LENGTHS) if policy.average == "token" else len(answers) * longest)


@pytest.mark.parametrize("changes", [{}, {"beta": 0.5, "unbiased_kl": True, "off_policy": 0.0}])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_the_formula(preset: str, changes: dict) -> None:
    policy = validate(PolicySection, {"preset": preset, **changes})
    for seed in range(3):
        logp, old, reference, drift, mask, advantages_S = numbers(seed)
        found = policy_loss(
            policy, logp, old, mask, advantages_S, Whole(4, sum(LENGTHS), 7), reference, drift
        )
        wanted = slow_loss(policy, logp, old, reference, drift, advantages_S, 7)
        assert float(found.loss) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_add_up_and_padding_counts_for_nothing(preset: str) -> None:
    policy = validate(PolicySection, {"preset": preset})
    logp, old, reference, _, mask, advantages_S = numbers(7)
    whole = Whole(4, sum(LENGTHS), 7)

    def loss(rows: slice, x: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            policy, x[rows], old[rows], mask[rows], advantages_S[rows], whole, reference[rows]
        ).loss

    logp.requires_grad_()
    once = torch.autograd.grad(loss(slice(0, 4), logp), logp)[0]
    pieces = torch.autograd.grad(loss(slice(0, 1), logp) + loss(slice(1, 4), logp), logp)[0]
    torch.testing.assert_close(once, pieces, rtol=1e-12, atol=1e-15)
    assert not once[~mask].any() and once[mask].any()
    other = torch.where(mask, logp.detach(), 9.0)
    torch.testing.assert_close(loss(slice(0, 4), other), loss(slice(0, 4), logp.detach()))


REWARDS = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 1.0, float("nan")]), min_size=4, max_size=4), min_size=1
)


@settings(deadline=None, max_examples=60)
@given(REWARDS, st.sampled_from(["group", "batch", "none"]), st.floats(-3, 3))
def test_advantages_compare_within_groups_only(rows: list[list[float]], scale: str, shift: float) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64)
    found = advantages(rewards, scale)
    assert found.isfinite().all() and not found[rewards.isnan()].any()
    assert found.sum(dim=1).abs().max() < 1e-6
    assert not found[without_signal(rewards)].abs().gt(1e-6).any()
    if scale == "group":  # an easier prompt changes nothing
        torch.testing.assert_close(advantages(rewards + shift, scale), found, rtol=1e-6, atol=1e-6)
    for row, better in zip(rewards, found):
        known = ~row.isnan()
        assert torch.equal(row[known].argsort(stable=True), better[known].argsort(stable=True))


def test_deviation_is_the_samples_without_what_is_missing() -> None:
    nan = float("nan")
    rewards = torch.tensor([[1.0, 2.0, nan], [nan, nan, 4.0], [nan, nan, nan]])
    assert deviation(rewards, dim=1).tolist() == pytest.approx([torch.tensor([1.0, 2.0]).std().item(), 0, 0])
    assert float(deviation(rewards)) == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item())
