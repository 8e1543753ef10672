"""Advantages of groups and the clipped loss (report 5.2.2), as pure functions of log-probabilities.

Shapes: P prompts, G answers a prompt, S = P G answers, T tokens an answer (padded), "L" T or 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.config.grpo import PolicySection

STEADY = 1e-4  # added to the deviation, as TRL does: groups of equal rewards divide by it


@dataclass(frozen=True)
class Whole:
    """What a micro batch is part of: the step's answers, their tokens, and tokens an answer may have."""

    sequences: int
    tokens: int
    longest: int


@dataclass(frozen=True)
class Terms:
    """A micro batch's part of the loss (summed over micro batches it is the step's), and what happened.

    ``low_SL`` and ``high_SL``: whether the clip cut the ratio, and the gradient with it. ``kl_ST``: k3 of
    every token, None without a reference. ``dropped_S``: answers left out as off-policy.
    """

    loss: Tensor
    low_SL: Tensor
    high_SL: Tensor
    kl_ST: Tensor | None
    dropped_S: Tensor


def deviation(values: Tensor, dim: int | None = None) -> Tensor:
    """Sample standard deviation of what is not nan; 0 of fewer than two values."""
    dims = tuple(range(values.dim())) if dim is None else (dim,)
    count = (~values.isnan()).sum(dims)
    mean = values.nanmean(dims, keepdim=True)
    squares = (values - mean).square().nansum(dims)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def advantages(rewards_PG: Tensor, scale: str) -> Tensor:
    """How much better than its group each answer is, FP32 ``[P, G]``; 0 where there is no reward (nan).

    ``scale`` is :attr:`PolicySection.scale`.
    """
    better_PG = rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True)
    if scale == "group":
        better_PG = better_PG / (deviation(rewards_PG, dim=1)[:, None] + STEADY)
    elif scale == "batch":
        better_PG = better_PG / (deviation(rewards_PG) + STEADY)
    return better_PG.nan_to_num(nan=0.0)


def without_signal(rewards_PG: Tensor) -> Tensor:
    """Groups whose rewards are all equal, or missing: bool ``[P]``. They teach nothing."""
    return deviation(rewards_PG, dim=1).isclose(rewards_PG.new_zeros(()))


def k3(logp_ST: Tensor, reference_ST: Tensor) -> Tensor:
    """Estimator of KL(policy || reference), a token: ref/pi - log(ref/pi) - 1, never below 0 (5.2.2)."""
    difference = reference_ST - logp_ST
    return difference.exp() - difference - 1


def policy_loss(
    policy: PolicySection,
    logp_ST: Tensor,
    old_ST: Tensor,
    mask_ST: Tensor,
    advantages_S: Tensor,
    whole: Whole,
    reference_ST: Tensor | None = None,
    drift_ST: Tensor | None = None,
) -> Terms:
    """Loss of a micro batch of answers, to be summed over the step's micro batches.

    ``logp_ST``: log-probabilities of the answers' tokens under the policy, the only input with a gradient;
    ``old_ST``: under the policy that the step's rollouts came from; ``reference_ST``: under the reference,
    needed with ``policy.beta``; ``drift_ST``: those of the engine that sampled less those of the policy now,
    needed with ``policy.off_policy``. ``mask_ST`` bool: tokens that exist.
    """
    weight_ST = mask_ST.to(logp_ST.dtype)
    lengths_S1 = weight_ST.sum(dim=1, keepdim=True).clamp(min=1)
    advantages_S1 = advantages_S[:, None]
    log_ratio_SL = logp_ST - old_ST
    if policy.ratio == "sequence":
        log_ratio_SL = (log_ratio_SL * weight_ST).sum(dim=1, keepdim=True) / lengths_S1
    ratio_SL = log_ratio_SL.exp()
    clipped_SL = ratio_SL.clamp(1 - policy.epsilon_low, 1 + policy.epsilon_high)
    loss_ST = -torch.min(ratio_SL * advantages_S1, clipped_SL * advantages_S1)

    dropped_S = torch.zeros_like(advantages_S, dtype=torch.bool)
    if policy.off_policy is not None:
        assert drift_ST is not None
        drift_S = (drift_ST * weight_ST).sum(dim=1) / lengths_S1[:, 0]
        dropped_S = (advantages_S < 0) & (drift_S > policy.off_policy)
        loss_ST = loss_ST * ~dropped_S[:, None]
    kl_ST = None
    if policy.beta:
        assert reference_ST is not None
        kl_ST = k3(logp_ST, reference_ST)
        if policy.unbiased_kl:
            kl_ST = kl_ST * ratio_SL
        loss_ST = loss_ST + policy.beta * kl_ST

    loss_ST = loss_ST * weight_ST
    if policy.average == "sequence":
        loss = (loss_ST.sum(dim=1) / lengths_S1[:, 0]).sum() / whole.sequences
    elif policy.average == "token":
        loss = loss_ST.sum() / max(1, whole.tokens)
    else:
        loss = loss_ST.sum() / (whole.sequences * whole.longest)
    return Terms(
        loss,
        low_SL=(ratio_SL < 1 - policy.epsilon_low) & (advantages_S1 < 0),
        high_SL=(ratio_SL > 1 + policy.epsilon_high) & (advantages_S1 > 0),
        kl_ST=None if kl_ST is None else kl_ST.detach(),
        dropped_S=dropped_S,
    )
