"""Balancing experts by their biases, without an auxiliary loss (report 2.1.2).

Shapes: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.model.moe import MoE, RouterStats
from dsv3.parallel.world import World


class Balancer:
    """Adds up the load of every layer over the micro batches of a step, then moves the biases once."""

    def __init__(self, layers: dict[int, MoE], world: World | None = None):
        self.layers, self.world = layers, world or World()
        self.load: dict[int, Tensor] = {}

    def add(self, router: dict[int, RouterStats]) -> None:
        """Count one micro batch. Call it on what a forward returned: a recomputed forward is not counted."""
        for layer, stats in router.items():
            seen = self.load.get(layer)
            self.load[layer] = stats.load_E.clone() if seen is None else seen.add_(stats.load_E)

    def gather(self) -> None:
        """After the last micro batch: the loads of all ranks, each of which has some layers and tokens."""
        if self.world.size == 1 or not self.layers:
            return
        experts = next(iter(self.layers.values())).gate.weight.shape[0]
        none = torch.zeros(experts, dtype=torch.int64, device=self.world.device)
        loads = self.world.add(torch.stack([self.load.get(layer, none) for layer in self.layers]))
        self.load = {layer: load_E for layer, load_E in zip(self.layers, loads) if load_E.any()}

    @torch.no_grad()
    def update(self, gamma: float) -> None:
        """``b_i += gamma * sign(mean load - load_i)`` from the load of the whole global batch."""
        for layer, load_E in self.load.items():
            if self.layers[layer].gate.e_score_correction_bias.is_meta:
                continue  # another pipeline stage's
            error_E = load_E.float().mean() - load_E.float()
            self.layers[layer].gate.e_score_correction_bias.add_(error_E.sign(), alpha=gamma)

    def take(self) -> dict[int, list[int]]:
        """The loads of the step by layer, tokens an expert; the count starts again at zero."""
        loads = {layer: load_E.tolist() for layer, load_E in sorted(self.load.items())}
        self.load = {}
        return loads


def max_violation(load: list[int]) -> float:
    """MaxVio: how far the busiest expert is above the mean, ``max / mean - 1``."""
    mean = sum(load) / len(load)
    return max(load) / mean - 1 if mean else 0.0
