"""Gradients, clipping and updates of every way to spread weights equal those of one process.

Two groups of processes (2 and 4 ranks) run all cases; each test looks at one.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

from tests.parallel.ranks import run_ranks

LENGTH, SEQUENCES = 16, 8
MODEL = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_nextn_predict_layers=1, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=2, n_group=4, topk_group=2, max_position_embeddings=64,
    initializer_range=0.05, aux_loss_alpha=1e-2,
)  # fmt: skip

# name: (replicate, shard, expert), options of the model
CASES: dict[int, dict[str, tuple[tuple[int, int, int], dict[str, Any]]]] = {
    2: {
        "shard 2": ((1, 2, 1), {}),
        "replicate 2": ((2, 1, 1), {}),
        "expert 2": ((1, 2, 2), {}),
        "expert 2 recompute layer": ((1, 2, 2), {"recompute": "layer"}),
        "expert 2 recompute report": ((1, 2, 2), {"recompute": "report"}),
        "expert 2 bf16": ((1, 2, 2), {"bf16": True}),
        "expert 2 fp8": ((1, 2, 2), {"fp8": True}),
        "expert 2 documents": ((1, 2, 2), {"documents": True}),
        "expert 2 no mtp": ((1, 2, 2), {"mtp_weight": 0.0}),
        "expert 2 one rank's experts idle": ((1, 2, 2), {"idle": True}),
        "shard 2 odd sizes": ((1, 2, 1), {"vocab_size": 97, "n_routed_experts": 9, "n_group": 3}),
    },
    4: {
        "shard 4": ((1, 4, 1), {}),
        "replicate 2 shard 2": ((2, 2, 1), {}),
        "shard 4 expert 2": ((1, 4, 2), {}),
        "expert 4": ((1, 4, 4), {}),
        "replicate 2 expert 2": ((2, 2, 2), {}),
        "more ranks than experts": ((1, 4, 1), {"n_routed_experts": 3, "n_group": 1, "topk_group": 1}),
        "shard 4 expert 2 fp8": ((1, 4, 2), {"fp8": True}),
    },
}
NAMES = [(world, name, zero) for world, cases in CASES.items() for name in cases for zero in (1, 3)]


def build(options: dict[str, Any]) -> tuple[Any, Any, float]:
    """The case's model, its whole batch, and the MTP weight; the same in every process."""
    from dsv3.config.fp8 import FP8Section
    from dsv3.config.model import ModelConfig
    from dsv3.data.loader import Batch
    from dsv3.model import DeepSeekV3
    from dsv3.quant import fp8
    from dsv3.train import recompute

    changes = {key: value for key, value in options.items() if key in ModelConfig.model_fields}
    config = ModelConfig.from_dict({**MODEL, **changes})
    model = DeepSeekV3(config)
    generator = torch.Generator().manual_seed(1)
    for moe in model.moe_layers().values():
        bias = moe.gate.e_score_correction_bias
        bias.copy_(0.05 * torch.randn(bias.shape, generator=generator))
        if options.get("idle"):  # the first half of the experts is never chosen
            bias[: len(bias) // 2] -= 100
    if options.get("bf16"):
        model.model.embed_tokens.compute_dtype = torch.bfloat16
    if options.get("fp8"):
        fp8.apply(model, FP8Section())
    recompute.apply(model, options.get("recompute", "none"))
    tokens = torch.randint(0, config.vocab_size, (SEQUENCES, LENGTH + 2), generator=generator)
    documents = None
    if options.get("documents"):
        documents = (torch.rand(tokens.shape, generator=generator) < 0.1).int().cumsum(1).int()
    return model, Batch(tokens, documents), options.get("mtp_weight", 0.3)


def gradients(model: Any, batch: Any, mtp_weight: float, rows: range, micro: int) -> float:
    """Backward over some rows of the batch as a part of the whole; the part's loss."""
    from dsv3.data.loader import Batch
    from dsv3.train.objective import Share, labels, language_loss

    counts = [int((labels(batch, LENGTH, k) >= 0).sum()) for k in range(2)]
    total = 0.0
    for first in range(rows.start, rows.stop, micro):
        part = slice(first, first + micro)
        piece = Batch(batch.tokens_BT[part], None if batch.documents_BT is None else batch.documents_BT[part])
        loss, _ = language_loss(model, piece, LENGTH, Share(counts, SEQUENCES), mtp_weight)
        loss.backward()
        total += float(loss.detach())
    return total


def compare(world_size: int) -> dict[str, Any]:
    """In a rank: every case against one process, which each rank is too, for itself."""
    import torch.distributed as dist

    from dsv3.parallel.layout import Layout, make_meshes
    from dsv3.parallel.weights import Weights
    from dsv3.parallel.world import World
    from tests.parallel.test_nodes import routed

    dist.init_process_group("gloo")
    found: dict[str, Any] = {"nodes of one rank": routed(1)} if world_size == 4 else {}
    for name, ((replicate, shard, expert), options) in CASES[world_size].items():
        layout = Layout(1, replicate, shard, expert)
        meshes = make_meshes(layout, "cpu")
        one, batch, mtp_weight = build(options)
        whole_loss = gradients(one, batch, mtp_weight, range(SEQUENCES), 4)
        wanted = {n: p.grad for n, p in one.named_parameters()}
        after = copy.deepcopy({n: p.detach() for n, p in one.named_parameters()})
        norm = World().norm(Weights(one).pieces.values())
        for zero in (1, 3):
            model, _, _ = build(options)
            world = World(layout, meshes, zero, node_size=2)
            weights, traffic = world.spread(model, fp8=bool(options.get("fp8")))
            share = SEQUENCES // world.data_size
            rows = range(world.data_rank * share, (world.data_rank + 1) * share)
            part = gradients(model, batch, mtp_weight, rows, max(1, share // 2))
            weights.collect()
            worst = 0.0
            for parameter, piece in weights.pieces.items():
                assert (piece.local.grad is None) == (wanted[parameter] is None), parameter
                if piece.local.grad is None:
                    continue
                whole = piece.distributed(piece.local.grad).full_tensor()  # type: ignore[attr-defined]
                error = (whole - wanted[parameter]).norm() / wanted[parameter].norm().clamp_min(1e-12)
                worst = max(worst, float(error))
            found_norm = world.norm(weights.pieces.values())
            with torch.no_grad():
                for piece in weights.pieces.values():
                    if piece.local.grad is not None:
                        piece.local.sub_(0.1 * piece.local.grad)
                for parameter in after if zero == 1 else ():
                    if wanted[parameter] is not None:
                        after[parameter].sub_(0.1 * wanted[parameter])
                for parameter, p in one.named_parameters():
                    p.copy_(after[parameter])
            weights.publish()
            weights.clear()
            one.zero_grad()
            following = gradients(model, batch, mtp_weight, rows, share)
            visits = sum(t.visits_X for t in traffic.values())
            totals = world.add(torch.tensor([part, following], dtype=torch.float64)).tolist()
            then = gradients(one, batch, mtp_weight, range(SEQUENCES), SEQUENCES)
            held = sum(p.local.numel() for p in weights.pieces.values())
            found[f"{name} zero {zero}"] = {
                "loss": abs(totals[0] - whole_loss) / whole_loss,
                "gradient": worst,
                "norm": abs(found_norm - norm) / norm,
                "after": abs(totals[1] - then) / then,
                "share held": held / sum(p.numel() for p in one.parameters()),
                "nodes": visits.tolist() if traffic else [],
            }
    return found


@cache
def results(world: int) -> list[dict[str, Any]]:
    return run_ranks(world, "tests.parallel.test_weights:compare", world)


@pytest.mark.parametrize(("world", "name", "zero"), NAMES)
def test_as_in_one_process(world: int, name: str, zero: int) -> None:
    for found in results(world):
        case = found[f"{name} zero {zero}"]
        loose = "bf16" in name or "fp8" in name
        assert case["loss"] < (1e-3 if loose else 1e-6)
        assert case["gradient"] < (0.15 if loose else 1e-5)
        assert case["norm"] < (0.02 if loose else 1e-5)
        assert case["after"] < (2e-3 if loose else 1e-5)


@pytest.mark.parametrize("zero", [1, 3])
def test_the_optimizers_share_shrinks(zero: int) -> None:
    """A rank updates a quarter of the weights, give or take what does not divide."""
    for name in ("shard 4", "shard 4 expert 2", "expert 4"):
        for found in results(4):
            assert 0.2 < found[f"{name} zero {zero}"]["share held"] < 0.3
    for found in results(4):
        assert 0.45 < found[f"replicate 2 shard 2 zero {zero}"]["share held"] < 0.55


def test_tokens_stay_within_their_groups_nodes() -> None:
    """Two nodes of two ranks: no token visits more nodes than topk_group, and many visit both."""
    for found in results(4):
        visits = found["expert 4 zero 1"]["nodes"]
        assert len(visits) == 3 and visits[0] == 0 and visits[1] and visits[2]
