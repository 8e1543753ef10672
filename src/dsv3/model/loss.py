"""The loss of language modelling from the states that the head reads: next token and MTP (report 2.2).

Shapes: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.model.moe import RouterStats
from dsv3.ops.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Share:
    """What one micro batch is of its step: every loss is a mean over the step, whatever its pieces.

    ``tokens``: labels that bear loss in the whole step, a depth (main model first). ``sequences``: of the
    whole step.
    """

    tokens: list[int]
    sequences: int


@dataclass(frozen=True)
class Losses:
    """One micro batch's part of the step's losses: detached scalars; and the routing statistics.

    ``divergence``: from a teacher, where there is one.
    """

    main: Tensor
    mtp: list[Tensor]
    balance: Tensor
    router: dict[int, RouterStats]
    divergence: Tensor | None = None


def states_loss(
    states: list[Tensor], labels: list[Tensor], head_VD: Tensor, share: Share, mtp_weight: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The total of a micro batch, with gradient; and detached the main model's part and each MTP depth's.

    ``states``: ``[B, T, D]`` a depth, the main model's first. ``labels``: int64 ``[B, T]`` a depth.
    """
    losses = [
        linear_cross_entropy(state.flatten(0, 1), head_VD, target.flatten()) / max(1, tokens)
        for state, target, tokens in zip(states, labels, share.tokens)
    ]
    total = main = losses[0]
    if mtp := losses[1:]:
        total = total + mtp_weight / len(mtp) * torch.stack(mtp).sum()
    return total, main.detach(), [x.detach() for x in mtp]
