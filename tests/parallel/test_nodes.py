"""Node-limited routing on several nodes: no token's experts lie on more nodes than topk_group (report 2.1.2).

Every node a group of experts. What the ranks counted is compared with a loop over tokens; the same tokens
routed without the limit visit more nodes, and more copies of them would travel between nodes.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from tests.parallel import test_weights
from tests.parallel.ranks import run_ranks

NODES, EXPERTS, CHOSEN, KEPT = 4, 16, 4, 2
TOKENS, LENGTH = 4 * 16, 16


def routed(node_size: int) -> dict[str, Any]:
    """In a rank: a forward pass with the limit and one without; what was counted, and what was chosen."""
    import torch
    import torch.distributed as dist

    from dsv3.config.model import ModelConfig
    from dsv3.model import DeepSeekV3
    from dsv3.parallel.layout import Layout, make_meshes
    from dsv3.parallel.world import World

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    ranks, found = dist.get_world_size(), {}
    layout = Layout(1, 1, ranks, ranks)
    meshes = make_meshes(layout, "cpu")
    for kept in (KEPT, NODES):
        changes = {"n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "n_group": NODES}
        config = ModelConfig.from_dict({**test_weights.MODEL, **changes, "topk_group": kept})
        model = DeepSeekV3(config)
        routings: dict[str, list[Any]] = {}
        for layer, moe in model.moe_layers().items():
            kept_here = routings[f"model.layers.{layer}"] = []
            moe.gate.register_forward_hook(lambda _, __, out, kept=kept_here: kept.append(out))
        _, traffic = World(layout, meshes, node_size=node_size).spread(model)
        generator = torch.Generator().manual_seed(meshes.rank)
        with torch.no_grad():
            model(torch.randint(0, config.vocab_size, (TOKENS // LENGTH, LENGTH), generator=generator))
        found[str(kept)] = {
            name: {
                "visits": counted.visits_X.tolist(),
                "away": int(counted.away),
                "copies": int(counted.copies),
                "chosen": routings[name][0].indices_NK.tolist(),
            }
            for name, counted in traffic.items()
        }
    return found


@cache
def results(ranks: int) -> list[dict[str, Any]]:
    if ranks == 4:  # started anyway: seconds saved
        return [found["nodes of one rank"] for found in test_weights.results(4)]
    return run_ranks(ranks, "tests.parallel.test_nodes:routed", ranks // NODES)


def by_hand(chosen: list[list[int]], own: int) -> tuple[list[int], int, int]:
    """Tokens by the nodes they visit, rows to other nodes, and copies with one a node: token by token."""
    visits, away, copies = Counter[int](), 0, 0
    for experts in chosen:
        nodes = [expert // (EXPERTS // NODES) for expert in experts]
        visits[len(set(nodes))] += 1
        away += sum(node != own for node in nodes)
        copies += len(set(nodes) - {own})
    return [visits[n] for n in range(NODES + 1)], away, copies


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_nodes_a_token_visits(ranks: int) -> None:
    """Four nodes, of one rank each, and of two."""
    copies = {KEPT: 0, NODES: 0}
    most = {KEPT: 0, NODES: 0}
    for rank, found in enumerate(results(ranks)):
        for kept in (KEPT, NODES):
            assert len(found[str(kept)]) == 2  # a layer and the MTP module
            for layer in found[str(kept)].values():
                visits, away, once = by_hand(layer["chosen"], rank // (ranks // NODES))
                assert len(layer["chosen"]) >= TOKENS - TOKENS // LENGTH  # the MTP module sees one less each
                assert layer["visits"] == visits and layer["away"] == away and layer["copies"] == once
                most[kept] = max(most[kept], *(n for n, count in enumerate(visits) if count))
                copies[kept] += once
    assert most == {KEPT: KEPT, NODES: NODES}
    assert copies[KEPT] < 0.75 * copies[NODES]
