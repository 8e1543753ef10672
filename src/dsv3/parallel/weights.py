"""What of the weights a rank updates: whole tensors, ZeRO-1 shards, or FSDP2 shards (report 3.2).

The optimizer, clipping, the moving average and checkpoints see :class:`Piece` s only, plain tensors, so that
they are written once for every layout. Losses are sums over the whole step already divided by its counts
(``model/loss``), hence gradients of the ranks are added, never averaged; the sums are FP32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import GroupedLinear
from dsv3.model.moe import MoE
from dsv3.model.mtp import MTPModule
from dsv3.parallel.collectives import all_gather, reduce_scatter
from dsv3.parallel.layout import Meshes

BUCKET = 1 << 26  # numbers reduced at once: 256 MiB of FP32


@dataclass
class Piece:
    """What a rank updates of one parameter.

    ``local``: its numbers, sharing the model's memory, with the gradient in ``grad``. ``shape``: of the whole
    parameter; ``mesh`` and ``placements``: how that is cut (None: not at all), always along the first
    dimension, where this piece begins with row ``first``. ``copies``: ranks with the same numbers.
    """

    local: nn.Parameter
    shape: torch.Size
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    first: int = 0
    copies: int = 1

    def distributed(self, local: Tensor) -> Tensor:
        """A tensor cut as this piece is (itself, a moment, an average), as the whole it is a part of."""
        if self.mesh is None:
            return local
        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=strides
        )


class Weights:
    """The weights of one process: every piece is a whole parameter.

    To an optimizer it looks like a module of the pieces. ``elsewhere``: parameters that another pipeline
    stage has too, and saves.
    """

    elsewhere: frozenset[str] | set[str] = frozenset()

    def __init__(self, model: nn.Module):
        self.model = model
        self.pieces = {
            name: Piece(p, p.shape)  # the parameter itself
            for name, p in trained(model)
        }

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [piece.local for piece in self.pieces.values()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same by name."""
        return [(name, piece.local) for name, piece in self.pieces.items()]

    def collect(self) -> None:
        """After the last backward of a step: the gradients of all ranks, summed, in the pieces."""

    def publish(self) -> None:
        """After an update of the pieces: the model computes with it."""

    def here(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with all its rows (of the experts those this rank was dealt), one at a time."""
        for name, parameter in trained(self.model):
            yield name, parameter.detach()

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.model.parameters(), *self.parameters()):
            parameter.grad = None


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are trained and here: a pipeline's other stages are on the meta device."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            yield name, parameter


def expert_parameters(model: nn.Module) -> set[int]:
    """Identities of the routed experts' parameters."""
    return {id(m.weight) for m in model.modules() if isinstance(m, GroupedLinear)}


@dataclass
class _Cut:
    """A parameter cut along its first dimension into ``ranks`` equal parts, the last ones shorter."""

    piece: Piece
    whole: nn.Parameter
    rows: int  # of a part
    size: int  # numbers of a part, padded


class ZeRO1(Weights):
    """Every rank computes with all the weights and updates a share of them (report 3.2: ZeRO-1).

    After a step's last backward gradients are reduced and scattered, after the update weights gathered, in
    buckets; between the two nothing but the shares' moments is held. Needs no hooks: it works under any
    pipeline schedule.
    """

    def __init__(self, model: nn.Module, meshes: Meshes):
        self.model, self.meshes = model, meshes
        experts = expert_parameters(model)
        self.pieces = {}
        cuts: dict[bool, list[_Cut]] = {False: [], True: []}
        for name, p in trained(model):
            routed = id(p) in experts
            ranks, rank = self._shared(routed)
            rows = -(-p.shape[0] // ranks)
            own = p.detach()[rank * rows : (rank + 1) * rows]
            piece = self.pieces[name] = make_piece(own, p.shape, routed, meshes)
            cuts[routed].append(_Cut(piece, p, rows, rows * p[0].numel()))
        self.buckets = [
            (routed, bucket) for routed, all_cuts in cuts.items() for bucket in _into_buckets(all_cuts)
        ]

    def _shared(self, routed: bool) -> tuple[int, int]:
        axis = "expert_shard" if routed else "shard"
        layout = self.meshes.layout
        return (layout.expert_shard if routed else layout.shard), self.meshes.place(axis)

    def _group(self, routed: bool) -> dist.ProcessGroup:
        return self.meshes.group("expert_shard" if routed else "shard")

    @torch.no_grad()
    def collect(self) -> None:
        """See :class:`Weights`."""
        for routed, bucket in self.buckets:
            used = [cut for cut in bucket if cut.whole.grad is not None]
            if not used:
                continue
            ranks, _ = self._shared(routed)
            mine = used[0].whole.new_empty(sum(cut.size for cut in used), dtype=torch.float32)
            everyone = mine.new_zeros(ranks, len(mine))
            for cut, start in zip(used, _starts(used)):
                assert cut.whole.grad is not None
                flat = cut.whole.grad.flatten()
                for rank, part in enumerate(flat.split(cut.size)):
                    everyone[rank, start : start + len(part)] = part
                cut.whole.grad = None
            if ranks > 1:
                reduce_scatter(mine, everyone.view(-1), group=self._group(routed))
            else:
                mine = everyone[0]
            if self.meshes.layout.replicate > 1:
                dist.all_reduce(mine, group=self.meshes.group("replicate"))
            for cut, start in zip(used, _starts(used)):
                local = cut.piece.local
                local.grad = mine[start : start + local.numel()].view_as(local)

    @torch.no_grad()
    def publish(self) -> None:
        """See :class:`Weights`."""
        for routed, bucket in self.buckets:
            ranks, _ = self._shared(routed)
            if ranks == 1:
                continue  # a piece is the parameter's own memory
            mine = bucket[0].whole.new_zeros(sum(cut.size for cut in bucket))
            for cut, start in zip(bucket, _starts(bucket)):
                mine[start : start + cut.piece.local.numel()] = cut.piece.local.flatten()
            everyone = mine.new_empty(ranks, len(mine))
            all_gather(everyone.view(-1), mine, group=self._group(routed))
            for cut, start in zip(bucket, _starts(bucket)):
                flat = cut.whole.detach().view(-1)
                for rank, part in enumerate(flat.split(cut.size)):
                    part.copy_(everyone[rank, start : start + len(part)])


def make_piece(local: Tensor, here: torch.Size, routed: bool, meshes: Meshes) -> Piece:
    """The piece ``local`` of a parameter that has the shape ``here`` before it is cut along its rows.

    Of ``routed`` experts that is what this rank was dealt of the whole.
    """
    layout = meshes.layout
    ranks, place = (
        (layout.expert_shard, meshes.place("expert_shard"))
        if routed
        else (layout.shard, meshes.place("shard"))
    )
    first = min(here[0], place * -(-here[0] // ranks))
    parameter = nn.Parameter(local.detach())
    if not routed:
        cut = (Replicate(), Shard(0))
        return Piece(parameter, here, meshes.dense, cut, first, layout.replicate)
    whole = torch.Size((here[0] * layout.expert, *here[1:]))
    first += meshes.place("expert") * here[0]
    return Piece(parameter, whole, meshes.dealt, (Replicate(), Shard(0), Shard(0)), first, layout.replicate)


def _into_buckets(cuts: list[_Cut]) -> Iterator[list[_Cut]]:
    filled = 0
    numbered = []
    for cut in cuts:
        numbered.append((filled // BUCKET, cut))
        filled += cut.whole.numel()
    for _, bucket in groupby(numbered, key=lambda pair: pair[0]):
        yield [cut for _, cut in bucket]


def _starts(cuts: list[_Cut]) -> list[int]:
    """Where each one's part begins when they lie one after another."""
    return [0, *accumulate(cut.size for cut in cuts)][:-1]


class FSDP(Weights):
    """Weights, gradients and optimizer state all cut (FSDP2); layers are gathered when they compute.

    The experts a rank was dealt are cut among the ranks with the same ones. Weights are gathered in FP32, so
    that gate, norms and quantisers see what they see in one process.
    """

    def __init__(self, model: nn.Module, meshes: Meshes):
        self.model, self.meshes = model, meshes
        layout = meshes.layout
        shapes = {name: p.shape for name, p in model.named_parameters()}
        experts = {name for name, p in model.named_parameters() if id(p) in expert_parameters(model)}
        dense = meshes.dense if layout.replicate > 1 else meshes.dense["shard"]
        for layer in [m for m in model.modules() if isinstance(m, DecoderLayer)]:
            apart: set[nn.Parameter] = set()
            if isinstance(layer.mlp, MoE):
                apart = set(layer.mlp.experts.parameters())
                if layout.replicate * layout.expert_shard > 1:
                    mesh = meshes.experts if layout.replicate > 1 else meshes.experts["expert_shard"]
                    fully_shard(layer.mlp.experts, mesh=mesh)
            if isinstance(layer, MTPModule):  # used before and after the layer's own forward
                fully_shard([layer.enorm, layer.hnorm, layer.eh_proj, layer.shared_head.norm], mesh=dense)
            fully_shard(layer, mesh=dense, ignored_params=apart)
        # The root's are used all the time: embedding, last norm, and the head outside of any forward.
        fully_shard(model, mesh=dense, reshard_after_forward=False)
        register_fsdp_forward_method(model, "hidden_states")  # what training calls
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.pieces, self.sharded = {}, {}
        for name, p in trained(model):
            local = p.to_local() if isinstance(p, DTensor) else p
            self.pieces[name] = make_piece(local, shapes[name], name in experts, meshes)
            self.sharded[name] = p

    @torch.no_grad()
    def collect(self) -> None:
        """See :class:`Weights`: FSDP2 has reduced them in the backward."""
        for name, piece in self.pieces.items():
            grad = self.sharded[name].grad
            piece.local.grad = grad.to_local() if isinstance(grad, DTensor) else grad

    def publish(self) -> None:
        """See :class:`Weights`: what was gathered before, by a forward without a backward, is dropped."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def here(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Weights`."""
        for name, parameter in self.sharded.items():
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
