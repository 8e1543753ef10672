"""One rank of ``dsv3 bench moe``: training steps of several layouts, and the rows' trips by themselves.

Shapes: N tokens of this rank, D hidden.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.config import recipe as recipes
from dsv3.config.train import PretrainRecipe
from dsv3.data.loader import Batch
from dsv3.model.moe import Dispatcher, LocalDispatcher, MoE
from dsv3.parallel.clock import Clock
from dsv3.parallel.experts import ExpertParallel, row_bytes
from dsv3.parallel.world import World, enter
from dsv3.train.objective import LanguageModelling
from dsv3.train.optimizer import build
from dsv3.train.stage import make_model
from dsv3.train.trainer import Trainer

CPU = torch.device("cpu")
CHUNK = 1 << 23  # bytes to each other rank, of the measured bandwidth
REPEATS = 5


class RandomTokens:
    """A :class:`dsv3.train.objective.Loader` of tokens drawn anew for every batch."""

    def __init__(self, length: int, vocabulary: int, rank: int, ranks: int):
        self.length, self.vocabulary, self.ranks = length, vocabulary, ranks
        self.generator = torch.Generator().manual_seed(rank)

    def batch(self, first_sample: int, count: int) -> Batch:
        """This rank's share of ``count`` samples."""
        shape = (count // self.ranks, self.length)
        return Batch(torch.randint(self.vocabulary, shape, generator=self.generator))


def recipe_of(job: dict[str, Any], case: dict[str, Any]) -> PretrainRecipe:
    """The training recipe of a case: a pass a step, without gates that are all the same."""
    tree = {
        "model": job["model"], "sequence_length": job["length"], "device": "cpu", "total_tokens": 1e12,
        "batch": {"sequences": case["sequences"], "micro_sequences": case["sequences"]},
        "parallel": case["parallel"],
    }  # fmt: skip
    return recipes.validate(PretrainRecipe, tree)


def steps_of(job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each counted step on this rank, and those of it spent waiting for rows of other ranks.

    ``alone``: every rank trains by itself at the same time, and says nothing to the others.
    """
    recipe = recipe_of(job, case)
    config = recipe.model
    world = World() if case["alone"] else enter(recipe.parallel, config, CPU)
    extra = 1 + config.num_nextn_predict_layers
    loader = RandomTokens(job["length"] + extra, config.vocab_size, world.data_rank, world.data_size)
    objective = LanguageModelling(loader, job["length"], recipe.total_tokens)
    model = make_model(recipe, CPU).train()
    pipeline = world.cut(model, job["length"])
    weights, traffic = world.spread(model, pipeline, case["fp8_rows"])
    rows = Clock()
    for moe in model.moe_layers().values():
        if isinstance(moe.dispatcher, ExpertParallel):
            moe.dispatcher.clock = rows
    trainer = Trainer(
        recipe, model, objective, build(weights, recipe.optimizer), (), world, weights, pipeline
    )
    seconds, waited = [], []
    for step in range(job["steps"] + 1):
        if dist.is_initialized():
            dist.barrier()
        before = rows.seconds
        taken = trainer.step().seconds
        if step:  # the first one warms up
            seconds.append(taken)
            waited.append(rows.seconds - before)
    found = {"seconds": seconds, "waited": waited, "layers": len(traffic)}
    if case["trips"]:
        moe = next(m for m in model.moe_layers().values() if isinstance(m.dispatcher, ExpertParallel))
        found["trips"] = trips(moe, config.hidden_size, case["sequences"] * job["length"] // world.data_size)
    return found


def trips(moe: MoE, width: int, tokens: int) -> dict[str, Any]:
    """Rows to a layer's experts and back without the experts, by what they travel as.

    Forward and backward, in seconds: ``seconds`` of the trips, ``sorting`` of the same rows in one process,
    ``bytes`` that leave this rank; and ``rate``, bytes a second that leave a rank in one large exchange.
    """
    parallel = cast(ExpertParallel, moe.dispatcher)
    group, traffic = parallel.group, parallel.traffic
    generator = torch.Generator().manual_seed(dist.get_rank())
    u_ND = torch.randn(tokens, width, generator=generator)
    with torch.no_grad():
        routing, stats = moe.route(u_ND[None])
    traffic.clear()
    traffic.count(routing.indices_NK)
    away = int(traffic.away)

    def there_and_back(dispatcher: Dispatcher, x_ND: Tensor) -> None:
        leaf = x_ND.clone().requires_grad_()
        rows, _, handle = dispatcher.dispatch(leaf, routing, stats.load_E)
        rows = dispatcher.combine(dispatcher.arrive(rows, handle), routing, handle)
        dispatcher.settle(rows, routing, handle).sum().backward()

    found: dict[str, Any] = {"rate": rate(group)}
    for name, dtype, fp8 in (
        ("fp32", torch.float32, False), ("bf16", torch.bfloat16, False), ("fp8", torch.float32, True),
    ):  # fmt: skip
        x_ND = u_ND.to(dtype)
        travelling = partial(there_and_back, ExpertParallel(group, traffic, Clock(), fp8), x_ND)
        found[name] = {
            "seconds": fastest(travelling, group),
            "sorting": fastest(partial(there_and_back, LocalDispatcher(), x_ND), group),
            "bytes": 2 * away * sum(row_bytes(width, dtype, fp8)),
        }
    return found


def rate(group: dist.ProcessGroup) -> float:
    """Bytes a second that leave a rank when all send the same to each other."""
    ranks = dist.get_world_size(group)
    sent, received = (torch.zeros(ranks * CHUNK // 4) for _ in range(2))
    seconds = fastest(lambda: dist.all_to_all_single(received, sent, group=group), group)
    return (ranks - 1) * CHUNK / seconds


def fastest(work: Callable[[], object], group: dist.ProcessGroup) -> float:
    """Least seconds of some repeats that all ranks begin together."""
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier(group)
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main() -> None:
    """Run every case of a job, on one core."""
    job = json.loads(sys.argv[1])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # each process a node of its own: rows that leave it are counted
    torch.set_num_threads(1)
    found = {name: steps_of(job, case) for name, case in job["cases"].items()}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
