"""The objective of language modelling: next token, MTP and balance losses (report 2.1.2 and 2.2).

Shapes: B batch, T time (X: with the extra tokens, 1 + MTP depth), F extra tokens.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv3.data.loader import Batch
from dsv3.data.targets import labels, positions
from dsv3.model import DeepSeekV3
from dsv3.model.loss import Losses, Share, states_loss
from dsv3.train.logits import Teacher
from dsv3.train.schedules import Extent
from dsv3.train.trainer import Accumulated, Trainer


class Loader(Protocol):
    """Batches as a pure function of the sample's index."""

    def batch(self, first_sample: int, count: int) -> Batch:
        """``count`` samples from ``first_sample`` on."""


def language_loss(
    model: DeepSeekV3,
    batch: Batch,
    length: int,
    share: Share,
    mtp_weight: float,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Losses]:
    """Loss of one micro batch (to be summed over the step's micro batches) and its parts.

    The batch holds ``length`` inputs a row and the tokens that follow, so that every position of every depth
    has its target. A ``teacher``'s divergence is one more part of the loss.
    """
    tokens_BX = batch.tokens_BT
    documents_BT = None if batch.documents_BT is None else batch.documents_BT[:, :length]
    positions_BT = positions(batch, length)
    states, router = model.hidden_states(
        tokens_BX[:, :length],
        future_ids_BF=tokens_BX[:, length : length + len(model.mtp_modules)],
        positions_BT=positions_BT,
        documents_BT=documents_BT,
        mtp=mtp_weight > 0,
    )
    targets = [labels(batch, length, depth) for depth in range(len(states))]
    total, main, mtp = states_loss(states, targets, model.lm_head.weight, share, mtp_weight)
    balances = [s.balance_loss for s in router.values() if s.balance_loss is not None]
    balance = torch.zeros((), device=main.device)
    if balances:
        balance = torch.stack(balances).sum() * (tokens_BX.shape[0] / share.sequences)
        total = total + model.config.aux_loss_alpha * balance
    divergence = None
    if teacher is not None:
        divergence = teacher.divergence(
            model, states[0], tokens_BX[:, :length], targets[0], positions_BT, documents_BT
        ) / max(1, share.tokens[0])
        total = total + teacher.weight * divergence
        divergence = divergence.detach()
    return total, Losses(main, mtp, balance.detach(), router, divergence)


class LanguageModelling:
    """Next token, MTP and balance losses over a loader's batches: pre-training, extension, SFT."""

    def __init__(self, loader: Loader, length: int, total_tokens: int, teacher: Teacher | None = None):
        self.loader, self.length, self.teacher = loader, length, teacher
        self.extent = Extent("tokens", total_tokens, length)

    def accumulate(self, trainer: Trainer, sequences: int) -> Accumulated:
        """Gradients of the whole step's batch, one micro batch at a time; of this rank's share of each."""
        world, micro, first = trainer.world, trainer.recipe.batch.micro_sequences, trainer.state.samples
        mtp_weight, length = trainer.schedules.mtp_weight(trainer.seen), world.part_length(self.length)
        batches = [
            self.loader.batch(first + done, min(micro, sequences)) for done in range(0, sequences, micro)
        ]
        if trainer.pipeline is not None:
            batches = trainer.pipeline.divided(batches)
        batches = [world.part(batch, self.length) for batch in batches]
        depths = 1 + len(trainer.model.mtp_modules)
        counts = [sum(int((labels(b, length, k) >= 0).sum()) for b in batches) for k in range(depths)]
        share = Share(world.add_data(torch.tensor(counts)).tolist(), sequences)
        batches = [batch.to(trainer.device) for batch in batches]
        losses = []
        if trainer.pipeline is not None:
            with trainer.world.clock.within("between the stages of the pipeline"):
                losses.append(trainer.pipeline.accumulate(batches, share, mtp_weight))
        for batch in batches if trainer.pipeline is None else ():
            loss, parts = language_loss(trainer.model, batch, length, share, mtp_weight, self.teacher)
            loss.backward()
            losses.append(parts)
        for parts in losses:
            trainer.balancer.add(parts.router)
        rows = world.gather(
            [
                sum(float(x.main) for x in losses),
                sum(float(x.balance) for x in losses),
                sum(float(x.divergence) for x in losses if x.divergence is not None),
                *(sum(float(x.mtp[k]) for x in losses) for k in range(len(losses[0].mtp))),
            ]
        )
        main, balance, divergence, *mtp = (sum(column) for column in zip(*rows))
        metrics: dict[str, Any] = {"mtp_loss": mtp, "balance_loss": balance, "mtp_weight": mtp_weight}
        if self.teacher is not None:
            metrics["divergence"] = divergence
        broken = [rank for rank, row in enumerate(rows) if not all(map(math.isfinite, row))]
        if broken and len(rows) > 1:
            metrics["ranks_not_finite"] = broken
        return Accumulated(main, sequences * self.length, metrics)
