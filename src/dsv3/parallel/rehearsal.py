"""A place in a layout without other processes, and a model without numbers: to count what a rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from dsv3.parallel.layout import Layout, make_meshes
from dsv3.parallel.pipeline import Pipeline
from dsv3.parallel.weights import Weights
from dsv3.parallel.world import World


@contextmanager
def rehearsed(
    layout: Layout, rank: int, config: ModelConfig, schedule: str, length: int, fp8: bool
) -> Iterator[tuple[Pipeline, Weights]]:
    """Rank ``rank``'s part of the model and what it updates of it, cut and spread as in a real run (ZeRO-1).

    torch's fake process group takes the place of the other ranks and fake tensors that of the weights, so
    neither time nor memory grows with either; nothing can be computed.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        meshes = make_meshes(layout, "cpu")
        with FakeTensorMode():  # not the meta device: there, weights are those of other pipeline stages
            model = DeepSeekV3(config)
        pipeline = Pipeline(model, schedule, meshes.group("pipeline"), length)
        weights, _ = World(layout, meshes, zero=1, node_size=8).spread(model, pipeline, fp8)
        yield pipeline, weights
    finally:
        dist.destroy_process_group()
