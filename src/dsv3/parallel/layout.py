"""A layout: how many processes stand along each axis, and the device mesh they form (report 3.2).

Ranks are numbered with the pipeline outermost, then copies, then what is left of the data ranks, then experts
innermost, so that ranks that share experts are neighbours and fill nodes. A pipeline stage has
``replicate * shard`` data ranks: each reads data of its own. Dense weights belong to all ``shard`` of them;
the experts of a layer are dealt to the ``expert`` neighbours, and what an expert rank holds belongs to
``expert_shard = shard / expert`` ranks. ``context`` neighbours read the same sequences, each a part of the
tokens; to weights they are data ranks like others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelSection


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; their product is the number of processes."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1

    @property
    def data(self) -> int:
        """Ranks of a stage: each has tokens of its own."""
        return self.replicate * self.shard

    @property
    def readers(self) -> int:
        """Shares a batch is cut into; the ranks of a context have the same one."""
        return self.data // self.context

    @property
    def world(self) -> int:
        """All processes."""
        return self.pipeline * self.data

    @property
    def expert_shard(self) -> int:
        """Ranks of a copy that hold the same experts."""
        return self.shard // self.expert

    def __str__(self) -> str:
        return (
            f"pipeline {self.pipeline}, data_replicate {self.replicate}, data_shard {self.shard}, "
            f"expert {self.expert}" + (f", context {self.context}" if self.context > 1 else "")
        )


def resolve(section: ParallelSection, config: ModelConfig, world: int) -> Layout:
    """The layout a recipe asks for on ``world`` processes; :class:`UserError` says what does not divide."""
    fixed = section.pipeline * section.data_replicate
    shard = section.data_shard or max(1, world // fixed)
    layout = Layout(section.pipeline, section.data_replicate, shard, section.expert, section.context)
    why = misfit(layout, config, world, section.schedule)
    if why is None:
        return layout
    fit = [other for c in {1, section.context} for other in fitting(config, world, section.schedule, c)]
    near = sorted(fit, key=lambda other: _distance(layout, other))
    way_out = "; layouts that fit: " + " | ".join(map(str, near[:3])) if near else ""
    if world == 1 and not near[1:]:
        way_out += "; start several processes: torchrun --nproc-per-node N -m dsv3 ..."
    raise UserError(f"parallel: {why}{way_out}")


def misfit(layout: Layout, config: ModelConfig, world: int, schedule: str = "dualpipev") -> str | None:
    """What is wrong with a layout, None if it fits."""
    if layout.world != world:
        return (
            f"pipeline ({layout.pipeline}) x data_replicate ({layout.replicate}) x data_shard "
            f"({layout.shard}) is {layout.world}, there are {world} processes"
        )
    if layout.shard % layout.expert:
        return f"expert ({layout.expert}) must divide data_shard ({layout.shard})"
    if layout.shard % layout.context:
        return f"context ({layout.context}) must divide data_shard ({layout.shard})"
    has_experts = any(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    if layout.expert > 1 and not has_experts:
        return f"expert ({layout.expert}) needs a model with experts"
    if has_experts and config.n_routed_experts % layout.expert:
        return f"expert ({layout.expert}) must divide n_routed_experts ({config.n_routed_experts})"
    stages = layout.pipeline * (1 if schedule == "1f1b" or layout.pipeline == 1 else 2)
    if stages > config.num_hidden_layers:
        return (
            f"pipeline ({layout.pipeline}) with schedule {schedule} needs {stages} stages, the model has "
            f"{config.num_hidden_layers} layers"
        )
    return None


def fitting(
    config: ModelConfig, world: int, schedule: str = "dualpipev", context: int = 1
) -> Iterator[Layout]:
    """Every layout of ``world`` processes with so many to a context that fits the model."""
    for pipeline in _divisors(world):
        for copies in _divisors(world // pipeline):
            shard = world // pipeline // copies
            for expert in _divisors(shard):
                layout = Layout(pipeline, copies, shard, expert, context)
                if misfit(layout, config, world, schedule) is None:
                    yield layout


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _distance(wanted: Layout, other: Layout) -> float:
    """Doublings between two layouts; the number of data ranks, which follows from the rest, counts little."""
    pairs = (
        (wanted.pipeline, other.pipeline, 1.0), (wanted.replicate, other.replicate, 1.0),
        (wanted.expert, other.expert, 1.0), (wanted.shard, other.shard, 0.1),
        (wanted.context, other.context, 1.0),
    )  # fmt: skip
    return sum(weight * abs(math.log2(a / b)) for a, b, weight in pairs)


@dataclass(frozen=True)
class Meshes:
    """This rank's place in a layout.

    ``dense``: dimensions (replicate, shard), what dense weights are spread over. ``experts``: (replicate,
    expert_shard), the ranks with the same experts. ``dealt``: (replicate, expert, expert_shard), the order in
    which a stacked expert tensor is cut: by expert rank first, then among those that share. ``context``: the
    ranks with the same sequences, None where each has its own.
    """

    layout: Layout
    rank: int
    whole: DeviceMesh
    dense: DeviceMesh
    experts: DeviceMesh
    dealt: DeviceMesh
    data: dist.ProcessGroup
    context: dist.ProcessGroup | None = None

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks beside this one along an axis: pipeline, replicate, shard, expert, expert_shard, data."""
        if axis == "data":
            return self.data
        return (self.dense if axis == "shard" else self.whole)[axis].get_group()

    def place(self, axis: str) -> int:
        """This rank's place among them."""
        return dist.get_group_rank(self.group(axis), self.rank)


def make_meshes(layout: Layout, device_type: str) -> Meshes:
    """The device meshes of a layout; the default process group must be there."""
    sizes = (layout.pipeline, layout.replicate, layout.expert_shard, layout.expert)
    whole = init_device_mesh(
        device_type, sizes, mesh_dim_names=("pipeline", "replicate", "expert_shard", "expert")
    )
    rank = dist.get_rank()
    stage = whole.mesh[rank // layout.data]  # ranks of this rank's pipeline stage

    def mesh(axes: tuple[str, ...], groups: list[dist.ProcessGroup], ranks: Tensor) -> DeviceMesh:
        return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=axes)

    replicate, expert_shard, expert = (
        whole[axis].get_group() for axis in ("replicate", "expert_shard", "expert")
    )
    shard = whole["expert_shard", "expert"]._flatten("shard").get_group()
    data = whole["replicate", "expert_shard", "expert"]._flatten("data").get_group()
    context = None
    if layout.context > 1:
        parts = (layout.world // layout.context, layout.context)
        context = init_device_mesh(device_type, parts, mesh_dim_names=("rest", "context"))[
            "context"
        ].get_group()
    own = rank % layout.expert
    return Meshes(
        layout,
        rank,
        whole,
        dense=mesh(("replicate", "shard"), [replicate, shard], stage.flatten(1)),
        experts=mesh(("replicate", "expert_shard"), [replicate, expert_shard], stage[:, :, own]),
        dealt=mesh(
            ("replicate", "expert", "expert_shard"),
            [replicate, expert, expert_shard],
            stage.permute(0, 2, 1),
        ),
        data=data,
        context=context,
    )
