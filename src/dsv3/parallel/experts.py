"""Expert parallel: each rank holds some experts of every layer, and tokens travel (report 2.1.2, 3.2.2).

Shapes: N tokens of this rank, K experts a token, M = N K rows sorted by expert, R rows that arrive, D hidden,
E experts, P ranks that share them, X bytes or numbers of a message.

A row goes to the rank of its expert by ``all_to_all_single`` with uneven splits: no token is ever dropped
and none is padded. The backward of dispatch is a combine of gradients, that of combine a dispatch. Every trip
is started in one step of a layer and waited for in a later one, in the backward too, so that what does not
depend on it (the shared experts; with a pipeline the other micro batch) runs meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import GroupedLinear
from dsv3.model.moe import Dispatcher, MoE, Routing
from dsv3.ops.permute import expert_order, sum_rows, weighted_sum
from dsv3.parallel import deep_ep
from dsv3.parallel.clock import Clock
from dsv3.parallel.layout import Meshes
from dsv3.parallel.traffic import Traffic, node_of_experts
from dsv3.parallel.wire import FP8, Cast, Wire


class Trip:
    """Rows on their way: ``send[p]`` rows to rank p, ``receive[p]`` from it."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: list[int],
        receive: list[int],
        wire: Wire,
        back: Wire,
        clock: Clock,
    ):
        self.group, self.send, self.receive, self.wire, self.back = group, send, receive, wire, back
        self.clock = clock
        self.pending: tuple[dist.Work, Tensor, Tensor] | None = None
        self.width, self.dtype = 0, torch.float32

    def returning(self, wire: Wire, back: Wire) -> Trip:
        """The trip home of the rows that this one brought."""
        return Trip(self.group, self.receive, self.send, wire, back, self.clock)

    def start(self, message_MX: Tensor, home: bool = False) -> None:
        """Send messages, one a row; ``home``: the other way round, for gradients."""
        send, receive = (self.receive, self.send) if home else (self.send, self.receive)
        message_MX = message_MX.contiguous()
        arrived = message_MX.new_empty(sum(receive), message_MX.shape[1])
        work = dist.all_to_all_single(arrived, message_MX, receive, send, group=self.group, async_op=True)
        self.pending = (work, arrived, message_MX)  # the message has to live until it is gone

    def wait(self) -> Tensor:
        """The messages that arrived."""
        assert self.pending is not None
        work, arrived, _ = self.pending
        with self.clock.waiting("while rows travelled"):
            work.wait()
        self.pending = None
        return arrived


# Between the two halves of a trip autograd sees a ticket, a tensor without elements: the rows themselves are
# not there yet, and there are not as many of them as were sent.


class _Dispatch(torch.autograd.Function):
    """Encodes each token once, copies it for its experts, sends the copies."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, inverse_NK: Tensor, trip: Trip) -> Tensor:
        trip.width, trip.dtype = x_ND.shape[1], x_ND.dtype
        trip.start(trip.wire.encode(x_ND).index_select(0, order_M // inverse_NK.shape[1]))
        ctx.save_for_backward(inverse_NK)
        ctx.trip = trip
        return x_ND.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor, None, None, None]:
        trip: Trip = ctx.trip
        grad_MD = trip.back.decode(trip.wait(), trip.width, trip.dtype)
        return sum_rows(grad_MD, ctx.saved_tensors[0], None), None, None, None


class _Send(torch.autograd.Function):
    """Sends rows as they are sorted."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, trip: Trip) -> Tensor:
        trip.width, trip.dtype = rows_MD.shape[1], rows_MD.dtype
        trip.start(trip.wire.encode(rows_MD))
        ctx.trip = trip
        return rows_MD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor, None]:
        trip: Trip = ctx.trip
        return trip.back.decode(trip.wait(), trip.width, trip.dtype), None


class _Arrive(torch.autograd.Function):
    """Waits for rows; in the backward sends their gradients home."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.wire.decode(trip.wait(), trip.width, trip.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        trip: Trip = ctx.trip
        trip.start(trip.back.encode(grad_RD), home=True)
        return grad_RD.new_empty(0), None


@dataclass
class Travelling:
    """What the four steps of a layer's tokens share.

    ``order``: how rows are sorted here; ``sort_R``: from the order of arrival, by rank, to that of experts.
    """

    order: tuple[Tensor, Tensor]
    sort_R: Tensor
    out: Trip
    home: Trip | None = None


class ExpertParallel:
    """A :class:`dsv3.model.moe.Dispatcher` between the ranks of a group, each with its ``E / P`` experts.

    ``fp8``: tokens, and on the way back the gradients of their results, travel in FP8, results and gradients
    of tokens in BF16 (report 3.3.4); else everything in the dtype of the activations.
    """

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic, clock: Clock, fp8: bool = False):
        self.group, self.ranks = group, dist.get_world_size(group)
        self.traffic, self.clock = traffic, clock
        results = Cast(torch.bfloat16) if fp8 else Cast()
        self.tokens: Wire = FP8() if fp8 else Cast()
        self.results: Wire = results
        self.result_grads: Wire = FP8(smallest_amax=0.0) if fp8 else Cast()
        self.token_grads: Wire = results

    @torch.compiler.disable
    def dispatch(self, x_ND: Tensor, routing: Routing, load_E: Tensor) -> tuple[Tensor, Tensor, Travelling]:
        """See :class:`dsv3.model.moe.Dispatcher`."""
        arriving_E = torch.empty_like(load_E)
        with self.clock.waiting("in the exchange of loads"):
            dist.all_to_all_single(arriving_E, load_E, group=self.group)
        arriving_PX, leaving_PX = arriving_E.view(self.ranks, -1), load_E.view(self.ranks, -1)
        send, receive = torch.stack((leaving_PX.sum(dim=1), arriving_PX.sum(dim=1))).tolist()
        order = expert_order(routing.indices_NK)
        trip = Trip(self.group, send, receive, self.tokens, self.token_grads, self.clock)
        ticket = _Dispatch.apply(x_ND, *order, trip)
        self.traffic.count(routing.indices_NK)
        local = torch.arange(arriving_PX.shape[1], device=load_E.device).repeat(self.ranks)
        sort_R = local.repeat_interleave(arriving_E).argsort(stable=True)
        return ticket, arriving_PX.sum(dim=0), Travelling(order, sort_R, trip)

    @torch.compiler.disable
    def arrive(self, rows_MD: Tensor, handle: Travelling) -> Tensor:
        """See :class:`dsv3.model.moe.Dispatcher`."""
        return _Arrive.apply(rows_MD, handle.out).index_select(0, handle.sort_R)

    @torch.compiler.disable
    def combine(self, y_MD: Tensor, routing: Routing, handle: Travelling) -> Tensor:
        """See :class:`dsv3.model.moe.Dispatcher`."""
        place_R = torch.empty_like(handle.sort_R)
        place_R[handle.sort_R] = torch.arange(len(place_R), device=place_R.device)
        handle.home = handle.out.returning(self.results, self.result_grads)
        return _Send.apply(y_MD.index_select(0, place_R), handle.home)

    @torch.compiler.disable
    def settle(self, rows: Tensor, routing: Routing, handle: Travelling) -> Tensor:
        """See :class:`dsv3.model.moe.Dispatcher`."""
        assert handle.home is not None
        return weighted_sum(_Arrive.apply(rows, handle.home), routing.gates_NK, *handle.order)


def row_bytes(width: int, dtype: torch.dtype, fp8: bool) -> tuple[int, int]:
    """Bytes of a row of activations on its way to an expert, and of its result on the way back."""
    if fp8:
        return FP8().row_bytes(width, dtype), Cast(torch.bfloat16).row_bytes(width, dtype)
    return Cast().row_bytes(width, dtype), Cast().row_bytes(width, dtype)


def apply(
    module: nn.Module,
    meshes: Meshes,
    node_size: int,
    fp8: bool = False,
    clock: Clock | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Traffic]:
    """Deal the experts of every layer in ``module`` (a model, or a stage of one) to the expert ranks.

    Each rank keeps the slice of the stacked weights that is its own; FP8 versions of the experts are dealt
    alike. ``node_size``: ranks a node; ``clock`` counts waiting; ``dtype``: of activations. Returns the
    traffic of each layer by path.
    """
    clock = clock or Clock()
    if meshes.layout.expert == 1:
        return {}
    layers: dict[str, MoE] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, DecoderLayer) or not isinstance(layer.mlp, MoE):
            continue
        if not layer.mlp.gate.weight.is_meta:  # else another pipeline stage's
            layers[path] = layer.mlp
    if not layers:
        return {}
    group, place = meshes.group("expert"), meshes.place("expert")
    gate = next(iter(layers.values())).gate
    (experts, width), device = gate.weight.shape, gate.weight.device
    share = experts // meshes.layout.expert
    node_E = node_of_experts(experts, group, node_size).to(device)
    own_node = int(node_E[place * share])
    why = deep_ep.missing(group, node_size, width, gate.chosen, dtype, fp8, device)
    why = deep_ep.agreed(why, group, device)
    buffer = deep_ep.make_buffer(group, width) if why is None else None
    found: dict[str, Traffic] = {}
    for path, moe in layers.items():
        for linear in moe.experts.modules():
            if isinstance(linear, GroupedLinear):
                own = linear.weight.detach()[place * share : (place + 1) * share]
                linear.weight = nn.Parameter(own.clone())
        dispatcher: Dispatcher
        if buffer is not None:
            found[path] = Traffic(node_E, own_node, deep_ep.row_bytes(width, fp8), True, "DeepEP")
            dispatcher = deep_ep.DeepEP(buffer, experts, found[path], clock, fp8)
        else:
            carrier = f"all_to_all_single (DeepEP not: {why})"
            found[path] = Traffic(node_E, own_node, 2 * sum(row_bytes(width, dtype, fp8)), False, carrier)
            dispatcher = ExpertParallel(group, found[path], clock, fp8)
        moe.dispatcher = dispatcher
    return found
