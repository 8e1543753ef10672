"""Where a trained model sends held-out tokens: the load of its experts by source, and nodes a token visits.

Shapes: N tokens, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from dsv3.checkpoint.hf import load
from dsv3.data.loader import TokenLoader
from dsv3.data.shards import open_split
from dsv3.model import DeepSeekV3
from dsv3.model.moe import Routing

SEQUENCES = 96  # of each source


@dataclass(frozen=True)
class Routes:
    """``load``: by source, for each layer with experts in order, the share of its choices an expert gets.

    ``nodes``: how many tokens (a layer counts them anew) visit one group of experts, two, and so on.
    """

    load: dict[str, list[list[float]]]
    nodes: list[int]

    @property
    def nodes_a_token(self) -> float:
        """Mean number of groups of experts that a token visits in a layer."""
        return float(np.average(np.arange(1, len(self.nodes) + 1), weights=self.nodes))

    @property
    def distance(self) -> float:
        """How far sources' loads lie apart: total variation, from 0 to 1; mean over layers and pairs."""
        loads = [np.array(load) for load in self.load.values()]
        return float(np.mean([np.abs(a - b).sum(axis=1).mean() / 2 for a, b in combinations(loads, 2)]))


@torch.no_grad()
def routes(folder: Path, data: Path, length: int) -> Routes:
    """Read held-out text of every source with the main model."""
    model = load(folder).eval()
    gates = [
        layer.gate for index, layer in model.moe_layers().items() if index < model.config.num_hidden_layers
    ]
    nodes = np.zeros(model.config.n_group, dtype=np.int64)
    shares: dict[str, list[list[float]]] = {}
    for name, shards, _ in open_split(str(data), "valid"):
        loader = TokenLoader([(shards, 1.0)], length)
        tokens_BT = loader.batch(0, min(SEQUENCES, loader.samples[0])).tokens_BT[:, :length]
        chosen = _choices(model, gates, tokens_BT)
        shares[name] = []
        for indices_NK in chosen:
            counts_E = torch.bincount(indices_NK.flatten(), minlength=model.config.n_routed_experts)
            shares[name].append((counts_E / counts_E.sum()).tolist())
            nodes += _visits(indices_NK, model.config.n_routed_experts, model.config.n_group)
    return Routes(shares, nodes.tolist())


def _choices(
    model: DeepSeekV3, gates: Sequence[torch.nn.Module], tokens_BT: torch.Tensor
) -> list[torch.Tensor]:
    """``[N, K]`` of each gate."""
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: object, routing: Routing) -> None:
        found.append(routing.indices_NK)

    hooks = [gate.register_forward_hook(keep) for gate in gates]
    try:
        model.hidden_states(tokens_BT, mtp=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _visits(indices_NK: torch.Tensor, experts: int, groups: int) -> np.ndarray:
    """How many tokens visit 1, 2, ... ``groups`` groups."""
    visited = torch.zeros(len(indices_NK), groups, dtype=torch.bool)
    visited.scatter_(1, indices_NK // (experts // groups), True)
    return torch.bincount(visited.sum(dim=1) - 1, minlength=groups).numpy()
