"""What a step's passes measured, under TRL's names, gathered a micro batch at a time.

Shapes: S answers, T tokens an answer, "L" T, or 1 where a number is an answer's.
"""

from __future__ import annotations

from torch import Tensor

from dsv3.parallel.world import World

LOWEST = "clip_ratio/low_min"


class Seen:
    """Means over the step's tokens or answers, gathered a micro batch at a time."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.extremes: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        """A part of a mean."""
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (before[0] + total, before[1] + count)

    def token(self, name: str, values_ST: Tensor, mask_ST: Tensor) -> None:
        """A mean over tokens."""
        self.add(name, float((values_ST * mask_ST).sum()), float(mask_ST.sum()))

    def clip(self, side: str, clipped_SL: Tensor, mask_ST: Tensor) -> None:
        """A share of the tokens, or of the answers where the ratio is an answer's."""
        if clipped_SL.shape[1] == 1:
            share_S = clipped_SL[:, 0].float()
            self.add(f"clip_ratio/{side}_mean", float(share_S.sum()), len(share_S))
        else:
            share_S = (clipped_SL & mask_ST).sum(dim=1) / mask_ST.sum(dim=1)
            self.token(f"clip_ratio/{side}_mean", clipped_SL.float(), mask_ST)
        if side == "low":
            name, value, better = LOWEST, float(share_S.min()), min
        elif side == "high":
            name, value, better = "clip_ratio/high_max", float(share_S.max()), max
        else:
            return
        self.extremes[name] = better(value, self.extremes.get(name, value))

    def difference(self, plain_ST: Tensor, sampled_ST: Tensor, mask_ST: Tensor) -> None:
        """Between the log-probabilities of training and those of the engine, from the same weights."""
        apart_ST = (plain_ST - sampled_ST).abs() * mask_ST
        name = "sampling/sampling_logp_difference"
        self.token(f"{name}/mean", apart_ST, mask_ST)
        self.extremes[f"{name}/max"] = max(float(apart_ST.max()), self.extremes.get(f"{name}/max", 0.0))

    def metrics(self, world: World) -> dict[str, float]:
        """All of it, of all ranks: each has measured the same things of its answers."""
        rows = world.gather([number for pair in self.sums.values() for number in pair])
        totals = [sum(column) for column in zip(*rows)]
        means = {name: a / b for name, a, b in zip(self.sums, totals[::2], totals[1::2])}
        for (name, _), values in zip(self.extremes.items(), zip(*world.gather(list(self.extremes.values())))):
            means[name] = min(values) if name == LOWEST else max(values)
        return means
