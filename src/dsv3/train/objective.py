"""The pre-training objective: next token, MTP and balance losses (report 2.1.2 and 2.2).

Shapes: B batch, T time, F extra tokens (1 + MTP depth).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.model.moe import RouterStats
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy


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
    """One micro batch's part of the step's losses: detached scalars; and the routing statistics."""

    main: Tensor
    mtp: list[Tensor]
    balance: Tensor
    router: dict[int, RouterStats]


def labels(tokens_BX: Tensor, length: int, depth: int, documents_BX: Tensor | None) -> Tensor:
    """Targets of depth k for each of the first ``length`` positions: the token k + 1 places on.

    With documents, a target in another document than its position bears no loss.
    """
    target = tokens_BX[:, 1 + depth : 1 + depth + length]
    if documents_BX is None:
        return target
    same = documents_BX[:, 1 + depth : 1 + depth + length] == documents_BX[:, :length]
    return torch.where(same, target, IGNORE)


def restarted_positions(documents_BT: Tensor) -> Tensor:
    """Positions that begin at zero with each document, ``[B, T]``."""
    place = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return place - torch.where(first, place, 0).cummax(dim=1)[0]


def pretrain_loss(
    model: DeepSeekV3,
    tokens_BX: Tensor,
    documents_BX: Tensor | None,
    length: int,
    share: Share,
    mtp_weight: float,
) -> tuple[Tensor, Losses]:
    """Loss of one micro batch (to be summed over the step's micro batches) and its parts.

    ``tokens_BX`` int64 ``[B, T + F]``: T inputs and the tokens that follow, so that every position of every
    depth has its target.
    """
    documents_BT = None if documents_BX is None else documents_BX[:, :length]
    positions = None if documents_BT is None else restarted_positions(documents_BT)
    states, router = model.hidden_states(
        tokens_BX[:, :length],
        future_ids_BF=tokens_BX[:, length : length + len(model.mtp_modules)],
        positions_BT=positions,
        documents_BT=documents_BT,
        mtp=mtp_weight > 0,
    )
    head = model.lm_head.weight
    losses = [
        linear_cross_entropy(
            state.flatten(0, 1), head, labels(tokens_BX, length, depth, documents_BX).flatten()
        )
        / max(1, share.tokens[depth])
        for depth, state in enumerate(states)
    ]
    main, mtp = losses[0], losses[1:]
    total = main
    if mtp:
        total = total + mtp_weight / len(mtp) * torch.stack(mtp).sum()
    balances = [s.balance_loss for s in router.values() if s.balance_loss is not None]
    balance = torch.zeros((), device=main.device)
    if balances:
        balance = torch.stack(balances).sum() * (tokens_BX.shape[0] / share.sequences)
        total = total + model.config.aux_loss_alpha * balance
    return total, Losses(main.detach(), [x.detach() for x in mtp], balance.detach(), router)
