"""Loads by source and nodes a token visits, against loops over tokens."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.bench.claims import routes
from dsv3.data.loader import TokenLoader
from tests.model.build import tiny_model

LENGTH = 16


class Shards:
    """A source in memory."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.ids, self.folder = torch.randint(3, 60, (200,), generator=generator), Path(f"source-{seed}")
        self.document_starts = torch.zeros(1).numpy()

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, start: int, stop: int) -> Any:
        return self.ids[start:stop].numpy()


def test_routes_against_a_loop_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().eval()
    config = model.config
    sources = {"a": Shards(1), "b": Shards(2)}
    monkeypatch.setattr(routes, "load", lambda folder: model)
    monkeypatch.setattr(routes, "open_split", lambda *_: [(name, s, 1.0) for name, s in sources.items()])
    found = routes.routes(Path("model"), Path("data"), LENGTH)

    nodes = [0] * config.n_group
    layers = [i for i in model.moe_layers() if i < config.num_hidden_layers]
    for name, shards in sources.items():
        rows = TokenLoader([(shards, 1.0)], LENGTH).batch(0, len(shards) // LENGTH).tokens_BT[:, :LENGTH]
        seen: dict[int, list[list[int]]] = {layer: [] for layer in layers}

        def keep(tokens: list[list[int]]) -> Any:
            return lambda module, given, routing: tokens.extend(routing.indices_NK.tolist())

        hooks = [model.moe_layers()[i].gate.register_forward_hook(keep(seen[i])) for i in layers]
        for row in rows:  # one sequence at a time
            model.hidden_states(row[None], mtp=False)
        for place, layer in enumerate(layers):
            chosen = seen[layer]
            assert len(chosen) == rows.numel()
            counts = [sum(tokens.count(e) for tokens in chosen) for e in range(config.n_routed_experts)]
            assert found.load[name][place] == pytest.approx([c / sum(counts) for c in counts])
            for tokens in chosen:
                nodes[len({e // (config.n_routed_experts // config.n_group) for e in tokens}) - 1] += 1
        for hook in hooks:
            hook.remove()
    assert found.nodes == nodes
    assert found.nodes_a_token == pytest.approx(sum(i * n for i, n in enumerate(nodes, 1)) / sum(nodes))
    assert not sum(nodes[config.topk_group :])


def test_distance_is_total_variation() -> None:
    loads = {
        "a": [[0.5, 0.5, 0.0], [1, 0, 0]],
        "b": [[0.0, 0.5, 0.5], [1, 0, 0]],
        "c": [[0.5, 0.5, 0.0], [0, 0, 1]],
    }
    wanted = [
        sum(abs(x - y) for x, y in zip(loads[p][layer], loads[q][layer])) / 2
        for p, q in combinations(loads, 2)
        for layer in range(2)
    ]
    assert routes.Routes(loads, [1]).distance == pytest.approx(sum(wanted) / len(wanted))
    assert routes.Routes({"a": loads["a"], "b": loads["a"]}, [1]).distance == 0
