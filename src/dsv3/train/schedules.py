"""Schedules as pure functions of how much a run has seen (report 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dsv3.config.train import Segments, TrainRecipe


@dataclass(frozen=True)
class Extent:
    """How long a run is: ``total`` of ``unit``, of which every sequence counts ``each``.

    Pre-training and SFT count tokens, stages whose sequences differ in length count sequences (samples).
    """

    unit: Literal["tokens", "samples"]
    total: int
    each: int


def factor(segments: Segments, position: float) -> float:
    """Value of a schedule at ``position`` (in the unit of ``until``).

    A piece covers positions from the end of the one before (0 for the first) up to, not including, its own
    ``until``; linear and cosine pieces start from the factor the one before ended with (0 for the first).
    """
    begin, value = 0.0, 0.0
    for piece in segments:
        if position < piece.until:
            if piece.shape == "constant":
                return piece.to
            done = (position - begin) / (piece.until - begin)
            if piece.shape == "cosine":
                done = (1 - math.cos(math.pi * done)) / 2
            return value + (piece.to - value) * done
        begin, value = piece.until, piece.to
    return value


class Schedules:
    """The four scheduled quantities of a recipe, each a function of what was seen before the step."""

    def __init__(self, recipe: TrainRecipe, extent: Extent):
        self.recipe, self.extent = recipe, extent
        self.unit = 1.0 if recipe.schedule.measure == "tokens" else float(extent.total)

    def _at(self, segments: Segments, seen: float) -> float:
        return factor(segments, seen / self.unit)

    def sequences(self, seen: float) -> int:
        """Sequences of the step: whole micro batches; a half of one, a quarter ... where the ramp begins.

        So whoever shares a micro batch evenly shares the smaller ones too, down to a sequence a rank.
        """
        part = self.recipe.batch.micro_sequences
        wanted = int(self.recipe.batch.sequences * self._at(self.recipe.schedule.batch, seen) + 1e-9)
        while part > max(1, wanted):
            part //= 2
        return max(1, wanted // part * part)

    def learning_rate(self, seen: float) -> float:
        """Learning rate of the step: during warm-up that of the step's end, so that the first is not zero."""
        segments = self.recipe.schedule.learning_rate
        if seen / self.unit < segments[0].until and segments[0].shape == "linear":
            seen += self.sequences(seen) * self.extent.each
            seen = min(seen, segments[0].until * self.unit)
        return self.recipe.optimizer.lr * self._at(segments, seen)

    def gamma(self, seen: float) -> float:
        """Step of the experts' biases."""
        return self.recipe.balance.gamma * self._at(self.recipe.schedule.gamma, seen)

    def mtp_weight(self, seen: float) -> float:
        """Lambda, the weight of the MTP loss."""
        return self.recipe.mtp.weight * self._at(self.recipe.schedule.mtp, seen)

    def steps(self, seen: int = 0) -> int:
        """Optimizer steps from where ``seen`` are seen to the end of the run."""
        count, each, total = 0, self.extent.each, self.extent.total
        last = self.recipe.schedule.batch[-1]
        settled = last.until if len(self.recipe.schedule.batch) == 1 else self.recipe.schedule.batch[-2].until
        while seen < total:
            if seen / self.unit >= settled and last.shape == "constant":  # the batch no longer changes
                return count + math.ceil((total - seen) / (self.sequences(seen) * each))
            seen += self.sequences(seen) * each
            count += 1
        return count
