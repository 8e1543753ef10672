"""Schedules as pure functions of the tokens seen (report 4.2)."""

from __future__ import annotations

import math

from dsv3.config.train import PretrainRecipe, Segments


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
    """The four scheduled quantities of a recipe, each a function of the tokens seen before the step."""

    def __init__(self, recipe: PretrainRecipe):
        self.recipe = recipe
        self.unit = 1.0 if recipe.schedule.measure == "tokens" else float(recipe.total_tokens)

    def _at(self, segments: Segments, tokens: float) -> float:
        return factor(segments, tokens / self.unit)

    def sequences(self, tokens: float) -> int:
        """Sequences of the step: whole micro batches, or less than one where the ramp begins."""
        micro = self.recipe.batch.micro_sequences
        wanted = int(self.recipe.batch.sequences * self._at(self.recipe.schedule.batch, tokens) + 1e-9)
        return max(1, wanted) if wanted < micro else wanted // micro * micro

    def learning_rate(self, tokens: float) -> float:
        """Learning rate of the step: during warm-up that of the step's end, so that the first is not zero."""
        segments = self.recipe.schedule.learning_rate
        if tokens / self.unit < segments[0].until and segments[0].shape == "linear":
            tokens += self.sequences(tokens) * self.recipe.sequence_length
            tokens = min(tokens, segments[0].until * self.unit)
        return self.recipe.optimizer.lr * self._at(segments, tokens)

    def gamma(self, tokens: float) -> float:
        """Step of the experts' biases."""
        return self.recipe.balance.gamma * self._at(self.recipe.schedule.gamma, tokens)

    def mtp_weight(self, tokens: float) -> float:
        """Lambda, the weight of the MTP loss."""
        return self.recipe.mtp.weight * self._at(self.recipe.schedule.mtp, tokens)

    def steps(self, tokens: int = 0) -> int:
        """Optimizer steps from ``tokens`` seen to the end of the run."""
        count, length, total = 0, self.recipe.sequence_length, self.recipe.total_tokens
        last = self.recipe.schedule.batch[-1]
        settled = last.until if len(self.recipe.schedule.batch) == 1 else self.recipe.schedule.batch[-2].until
        while tokens < total:
            if tokens / self.unit >= settled and last.shape == "constant":  # the batch no longer changes
                return count + math.ceil((total - tokens) / (self.sequences(tokens) * length))
            tokens += self.sequences(tokens) * length
            count += 1
        return count
