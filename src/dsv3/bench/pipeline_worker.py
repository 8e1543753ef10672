"""One rank of ``dsv3 bench pipeline``: runs steps of a small model and prints when each job ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelSection
from dsv3.data.loader import Batch
from dsv3.model import DeepSeekV3
from dsv3.model.loss import Share
from dsv3.parallel.world import enter


def run(job: dict[str, Any]) -> list[list[Any]]:
    """``[[jobs, start, end], ...]`` of each counted step, in seconds of a clock all processes share."""
    config = ModelConfig.preset("tiny", **job["model"])
    section = ParallelSection(pipeline=job["ranks"], data_shard=1, schedule=job["schedule"])
    world = enter(section, config, torch.device("cpu"))
    pipeline = world.cut(DeepSeekV3(config), job["length"])
    assert pipeline is not None
    generator = torch.Generator().manual_seed(0)
    depth, length, count = config.num_nextn_predict_layers, job["length"], job["micro_batches"]
    shape = (job["sequences"], length + 1 + depth)
    batches = [Batch(torch.randint(config.vocab_size, shape, generator=generator)) for _ in range(count)]
    share = Share([count * job["sequences"] * length] * (1 + depth), count * job["sequences"])
    steps = []
    for step in range(job["steps"] + 1):
        pipeline.trace.on = step > 0  # the first one warms up
        pipeline.trace.ran.clear()
        pipeline.part.zero_grad()
        world.barrier()
        pipeline.accumulate(batches, share, 0.3)
        if step:
            steps.append(list(pipeline.trace.ran))
    world.close()
    return steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(run(given)), encoding="utf-8")
