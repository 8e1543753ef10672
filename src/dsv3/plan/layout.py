"""A recipe's layout rehearsed: the real model, cut and spread by ``parallel``, without memory or a cluster.

The process group is torch's fake one and tensors have shapes but no numbers, so what is counted is what the
training code would hold: FP32 weights and gradients, ZeRO-1 shards of the moments, experts dealt to the
expert ranks. Activations are by formula (``plan/memory``), for as many micro-batches as the schedule's order
holds. Bytes and GB (1e9) of one GPU; traffic of one step, sent by that GPU.

Left out: copies in FP8 or BF16 made while a product needs them, what torch, NCCL and fragmentation take, and
the moving average of the weights (in CPU memory).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from dsv3.common.errors import UserError
from dsv3.common.progress import Progress
from dsv3.config.model import ModelConfig
from dsv3.config.train import PretrainRecipe
from dsv3.parallel.layout import Layout, resolve
from dsv3.parallel.pipeline import Pipeline
from dsv3.parallel.rehearsal import rehearsed
from dsv3.parallel.weights import Weights
from dsv3.parallel.wire import FP8, Cast, Wire
from dsv3.plan.hardware import Hardware
from dsv3.plan.memory import activation_bytes
from dsv3.plan.schedules import Action, schedule

FP32, BF16 = 4, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of the residual stream


@dataclass(frozen=True)
class RankPlan:
    """One pipeline rank's GPU: any of its data ranks. Bytes, and bytes sent a step."""

    rank: int
    stages: tuple[int, ...]
    layers: int
    parameters: int
    memory: dict[str, int]
    traffic: dict[str, int]

    @property
    def total(self) -> int:
        """All of its memory."""
        return sum(self.memory.values())


def rehearse(recipe: PretrainRecipe, gpus: int) -> tuple[Layout, list[RankPlan]]:
    """What every pipeline rank holds and sends.

    Raises :class:`UserError` for a layout that does not fit, or one this does not rehearse (zero: 3).
    """
    section, config = recipe.parallel, recipe.model
    layout = resolve(section, config, gpus)
    if section.zero == 3:
        raise UserError("parallel.zero (3) is not rehearsed: use --parallel.zero 1, the report's")
    micro_batches = _micro_batches(recipe, layout)
    name = section.schedule if layout.pipeline > 1 else "1f1b"
    orders = schedule(name, layout.pipeline, micro_batches).orders
    found = []
    with Progress("pipeline ranks", layout.pipeline) as progress:
        for rank in range(layout.pipeline):
            place, fp8 = rank * layout.data, recipe.precision == "fp8"
            with rehearsed(layout, place, config, name, recipe.sequence_length, fp8) as (pipeline, weights):
                found.append(_rank_plan(recipe, layout, pipeline, weights, orders[rank], micro_batches))
            progress.advance(1)
    return layout, found


def _micro_batches(recipe: PretrainRecipe, layout: Layout) -> int:
    batch = recipe.batch
    readers = layout.readers
    if batch.micro_sequences % readers:
        raise UserError(
            f"batch.micro_sequences ({batch.micro_sequences}) must be a multiple of the data ranks "
            f"({readers}); try {-(-batch.micro_sequences // readers) * readers}"
        )
    return batch.sequences // batch.micro_sequences


def _rank_plan(
    recipe: PretrainRecipe,
    layout: Layout,
    pipeline: Pipeline,
    weights: Weights,
    order: tuple[Action, ...],
    micro_batches: int,
) -> RankPlan:
    config, part = recipe.model, pipeline.part
    parameters = sum(p.numel() for p in part.parameters())
    moment = {"bf16": BF16, "fp32": FP32}[recipe.optimizer.moments_in(recipe.precision)]
    updated = sum(piece.local.numel() for piece in weights.pieces.values())
    tokens = recipe.batch.micro_sequences * recipe.sequence_length // layout.data
    held = _held(order)
    layers = {stage: _layers(config, pipeline, stage) for stage in pipeline.stages}
    fp8 = recipe.precision == "fp8"
    activations = sum(
        held[stage] * tokens * activation_bytes(config, fp8, config.is_moe(layer))
        for stage in pipeline.stages
        for layer in layers[stage]
    )
    last = len(pipeline.cut) - 1
    memory = {
        "weights": FP32 * parameters,
        "gradients": FP32 * parameters,
        "optimizer": 2 * moment * updated,
        "activations": round(activations),
    }
    if part.ends:  # gradients that linear_cross_entropy makes with the loss, one a head, kept until B
        memory["head"] = held[last] * (1 + pipeline.depths) * FP32 * config.vocab_size * config.hidden_size
    every = [layer for found in layers.values() for layer in found]
    traffic = _traffic(recipe, layout, pipeline, tokens * micro_batches, every)
    routed = sum(p.numel() for name, p in part.named_parameters() if ".experts." in name)
    for ranks, size in ((layout.expert_shard, routed), (layout.shard, parameters - routed)):
        # reduce-scatter of the gradients, all-gather of the weights
        traffic["ZeRO-1"] += round(2 * FP32 * size * (ranks - 1) / ranks)
    return RankPlan(pipeline.rank, pipeline.stages, len(every), parameters, memory, dict(traffic))


def _layers(config: ModelConfig, pipeline: Pipeline, stage: int) -> list[int]:
    """Ids of a stage's layers, MTP modules too."""
    main, pieces = config.num_hidden_layers, pipeline.cut[stage]
    found = [piece - 1 for piece in pieces if 1 <= piece <= main]
    return found + [main + k for k in range(pipeline.depths if main + 1 in pieces else 0)]


def _held(order: tuple[Action, ...]) -> Counter[int]:
    """Micro-batches of each stage whose activations are held when a rank holds the most of them in all."""
    now: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for action in order:
        for job in action:
            if job.kind == "F":
                now[job.stage] += 1
        if now.total() > most.total():
            most = Counter(now)
        for job in action:
            if job.kind in "BW":
                now[job.stage] -= 1
    return most


def _traffic(
    recipe: PretrainRecipe, layout: Layout, pipeline: Pipeline, tokens: int, layers: list[int]
) -> Counter[str]:
    """Bytes this GPU sends in a step for ``tokens`` tokens: along the pipeline, and to experts and back."""
    config, dtype = recipe.model, DTYPES[recipe.precision]
    width, last = config.hidden_size, len(pipeline.cut) - 1
    traffic: Counter[str] = Counter()
    for stage in pipeline.stages:
        for other in (stage + 1, stage - 1):  # forward to the next, gradients to the one before
            if 0 <= other <= last and other not in pipeline.stages:
                traffic["pipeline"] += tokens * width * dtype.itemsize
    fp8 = recipe.precision == "fp8"
    wires: tuple[Wire, ...] = (FP8(), Cast(torch.bfloat16)) if fp8 else (Cast(), Cast())
    row = 2 * sum(wire.row_bytes(width, dtype) for wire in wires)  # out and home, forward and backward
    rows = sum(config.is_moe(layer) for layer in layers) * tokens * config.num_experts_per_tok
    traffic["all-to-all"] = round(rows * row * (layout.expert - 1) / layout.expert)
    if layout.context > 1:  # latents to the others of the context; of theirs the gradients home, in FP32
        latent = (config.kv_lora_rank + config.qk_rope_head_dim) * (dtype.itemsize + FP32)
        traffic["context"] = len(layers) * tokens * latent * (layout.context - 1)
    return traffic


def summary(recipe: PretrainRecipe, gpus: int, machine: Hardware) -> dict[str, Any]:
    """Plain data; keys name their units."""
    layout, ranks = rehearse(recipe, gpus)
    fullest = max(ranks, key=lambda plan: plan.total)
    return {
        "gpus": gpus,
        "hardware": machine.name,
        "layout": {
            "pipeline": layout.pipeline, "expert": layout.expert, "data_shard": layout.shard,
            "data_replicate": layout.replicate, "context": layout.context, "zero": 1,
            "schedule": recipe.parallel.schedule,
        },
        "micro_batches": _micro_batches(recipe, layout),
        "memory_bytes_per_gpu": machine.memory,
        "fullest_rank": fullest.rank,
        "fullest_bytes": fullest.total,
        "holds": fullest.total <= machine.memory,
        "ranks": [
            {
                "pipeline_rank": plan.rank, "stages": list(plan.stages), "layers": plan.layers,
                "parameters": plan.parameters, "bytes_by_part": plan.memory, "bytes": plan.total,
                "sent_bytes_per_step": plan.traffic,
            }
            for plan in ranks
        ],
    }  # fmt: skip
