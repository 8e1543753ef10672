"""Expert parallel by DeepEP's kernels, where somebody installed them (report 3.2.2).

Shapes: N tokens of this rank, K experts a token, R tokens that arrive, M rows: an arrived token for each of
its experts that is here, sorted by expert; D hidden, E experts.

A token travels once to each rank that holds one of its experts, with its gates; there its results are
weighted and summed, so that one sum a rank comes home, where DeepEP adds the ranks' sums. The backward of a
dispatch is a combine, which brings the gates' gradients home too; that of a combine is a dispatch of
gradients to where the tokens went before. The interface is ``deep_ep.Buffer`` with its normal kernels, which
DeepEP's second version keeps as its legacy one.

With precision fp8 tokens travel in FP8 as in :mod:`dsv3.parallel.experts`, everything else in BF16, the
gradients of results too: an expert's Linear quantises a result's gradient, here its token's times its gate. A
gate is no power of two, so what had travelled in FP8 would be rounded twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dsv3.common.errors import Failure, UserError, nearest
from dsv3.model.moe import Routing
from dsv3.ops.blocks import ROW, Quantised, dequantise, quantise
from dsv3.ops.formats import E4M3
from dsv3.parallel.clock import Clock
from dsv3.parallel.traffic import Traffic
from dsv3.parallel.wire import FP8, Cast

VARIABLE = "DSV3_EXPERT_DISPATCH"
NAMES = ("auto", "all_to_all")
NVLINK_RANKS = 8  # that reach each other by NVLink; others by RDMA
WIDEST = 8064  # on Hopper half a token in BF16 and a barrier share 8 KiB
MOST_CHOSEN = 32  # a lane of a warp each


def missing(
    group: dist.ProcessGroup,
    node_size: int,
    width: int,
    chosen: int,
    dtype: torch.dtype,
    fp8: bool,
    device: torch.device,
) -> str | None:
    """Why this rank cannot use it in a group, or None.

    ``node_size``: ranks a node. ``width``, ``chosen``: of a token, its numbers and its experts. ``dtype``: of
    activations.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in NAMES:
        raise UserError(
            f"{VARIABLE} ({wanted}) is unknown{nearest(wanted, NAMES)}; use one of {', '.join(NAMES)}"
        )
    if wanted == "all_to_all":
        return f"{VARIABLE} is all_to_all"
    if device.type != "cuda":
        return "no CUDA device"
    if importlib.util.find_spec("deep_ep") is None:
        return "deep_ep is not installed"
    try:
        settings = _library().Buffer.get_dispatch_config
    except Exception as error:  # built for another torch, CUDA or NCCL, or without its first interface
        return f"deep_ep cannot be used: {type(error).__name__} {error}".splitlines()[0]
    ranks = dist.get_world_size(group)
    try:
        settings(ranks)
    except AssertionError:
        return f"it has no settings for {ranks} ranks"
    if dtype != torch.bfloat16 and not fp8:
        return f"it takes BF16, activations are {dtype}".replace("torch.", "")
    if width % 128 or width > WIDEST:
        return f"it takes multiples of 128 up to {WIDEST} as hidden_size, not {width}"
    if chosen > MOST_CHOSEN:
        return f"it takes up to {MOST_CHOSEN} experts a token, not {chosen}"
    nodes = [rank // node_size for rank in dist.get_process_group_ranks(group)]
    if any(len(set(nodes[n : n + NVLINK_RANKS])) > 1 for n in range(0, ranks, NVLINK_RANKS)):
        return f"{min(ranks, NVLINK_RANKS)} expert ranks in a row must share a node of {node_size}"
    return None


def agreed(why: str | None, group: dist.ProcessGroup, device: torch.device) -> str | None:
    """:func:`missing` of all ranks of the group: one that cannot stops the others."""
    can = torch.tensor(why is None, dtype=torch.int32, device=device)
    dist.all_reduce(can, dist.ReduceOp.MIN, group=group)
    return why if why or bool(can) else "another rank cannot use it"


def _library() -> Any:
    return importlib.import_module("deep_ep")


def make_buffer(group: dist.ProcessGroup, width: int) -> Any:
    """The memory through which all layers' tokens of ``width`` numbers travel; all ranks together."""
    buffer, ranks = _library().Buffer, dist.get_world_size(group)
    token = width * torch.bfloat16.itemsize
    try:
        settings = buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)
        nvlink = max(setting.get_nvl_buffer_size_hint(token, ranks) for setting in settings)
        rdma = 0  # a build for one node cannot be asked
        if ranks > NVLINK_RANKS:
            rdma = max(setting.get_rdma_buffer_size_hint(token, ranks) for setting in settings)
        return buffer(group, nvlink, rdma)
    except Exception as error:  # no NVLink between all, no NVSHMEM, no memory
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise Failure(
            f"DeepEP makes no buffer here ({reason}); {VARIABLE}=all_to_all does without"
        ) from error


def row_bytes(width: int, fp8: bool) -> int:
    """Bytes of a token's numbers to a rank and of the sum back, in both passes."""
    full = Cast(torch.bfloat16).row_bytes(width, torch.bfloat16)
    return 3 * full + (FP8().row_bytes(width, torch.bfloat16) if fp8 else full)


class Passage:
    """One layer's tokens out, sums home, and the same for gradients: a call of the buffer at a time.

    A call is made in one step and waited for in a later one. Until then what it reads is held: autograd would
    otherwise add to a gradient in place, once nobody else has it, while it is being sent.
    """

    def __init__(self, buffer: Any, clock: Clock, dtype: torch.dtype):
        self.buffer, self.clock, self.dtype = buffer, clock, dtype
        self.counts: list[int] = []  # rows an expert of this rank
        self.handle: Any = None  # DeepEP's: who sent what to whom
        self.pending: tuple[tuple[Any, ...], Any, tuple[Any, ...]] | None = None

    def dispatch(self, x_ND: Tensor, gates_NK: Tensor, indices_NK: Tensor, experts: int, fp8: bool) -> None:
        """Send tokens and their gates; knows ``counts`` when it returns, for which the CPU waits."""
        message: Any = x_ND.contiguous()
        if fp8:
            made = quantise(x_ND, ROW, power_of_two_scales=True)
            message = (made.values.contiguous(), made.scales.contiguous())
        indices = indices_NK.to(getattr(_library(), "topk_idx_t", torch.int64)).contiguous()
        gates = gates_NK.contiguous()
        # Not waited for: the dispatch runs after it, on the same stream.
        to_rank, to_node, to_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            indices, experts, async_finish=True
        )
        with self.clock.waiting("in DeepEP's dispatch of tokens"):
            arrived, local, weights, self.counts, self.handle, event = self.buffer.dispatch(
                message,
                num_tokens_per_rank=to_rank,
                num_tokens_per_rdma_rank=to_node,
                num_tokens_per_expert=to_expert,
                is_token_in_rank=in_rank,
                topk_idx=indices,
                topk_weights=gates,
                async_finish=True,
            )
        self.pending = ((arrived, local, weights), event, (message, indices, gates))

    def dispatch_again(self, x_ND: Tensor) -> None:
        """Send something else of each token to where it went."""
        message = x_ND.to(torch.bfloat16).contiguous()
        arrived, _, _, _, _, event = self.buffer.dispatch(message, handle=self.handle, async_finish=True)
        self.pending = ((arrived,), event, (message,))

    def combine(self, x_RD: Tensor, weights_RK: Tensor | None = None) -> None:
        """Send something of each arrived token home, where the ranks' are added; its choices' numbers too."""
        message = x_RD.to(torch.bfloat16).contiguous()
        weights = None if weights_RK is None else weights_RK.contiguous()
        home, weights_home, event = self.buffer.combine(
            message, self.handle, topk_weights=weights, async_finish=True
        )
        self.pending = ((home, weights_home), event, (message, weights))

    def wait(self) -> tuple[Any, ...]:
        """What the call brought."""
        assert self.pending is not None
        brought, event, _ = self.pending
        with self.clock.waiting("while tokens travelled by DeepEP"):
            event.current_stream_wait()
        self.pending = None
        return brought


# As in experts.py, autograd sees a ticket without elements where something is on its way.


class _Dispatch(torch.autograd.Function):
    """Sends tokens and gates."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gates_NK: Tensor,
        indices_NK: Tensor,
        experts: int,
        fp8: bool,
        passage: Passage,
    ) -> Tensor:
        passage.dispatch(x_ND, gates_NK, indices_NK, experts, fp8)
        ctx.passage = passage
        return x_ND.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_NK = ctx.passage.wait()
        return grad_ND.to(ctx.passage.dtype), grad_NK, None, None, None, None


class _Arrive(torch.autograd.Function):
    """Waits for tokens: them, and their gates and experts here; in the backward sends gradients home."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, passage: Passage) -> tuple[Tensor, Tensor, Tensor]:
        ctx.passage = passage
        arrived, local_RK, gates_RK = passage.wait()
        if isinstance(arrived, tuple):
            values, scales = arrived
            arrived = dequantise(Quantised(values, scales, values.shape, ROW, E4M3))
        ctx.mark_non_differentiable(local_RK)
        return arrived.to(passage.dtype), gates_RK, local_RK

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor, grad_RK: Tensor, _: Any) -> tuple[Tensor, None]:
        ctx.passage.combine(grad_RD, grad_RK)
        return grad_RD.new_empty(0), None


class _Send(torch.autograd.Function):
    """Sends sums home."""

    @staticmethod
    def forward(ctx: Any, sums_RD: Tensor, passage: Passage) -> Tensor:
        passage.combine(sums_RD)
        ctx.passage = passage
        return sums_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor, None]:
        (grad_RD,) = ctx.passage.wait()
        return grad_RD.to(ctx.passage.dtype), None


class _Settle(torch.autograd.Function):
    """Waits for the sums of all ranks; in the backward sends their gradients out."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        return passage.wait()[0].to(passage.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        ctx.passage.dispatch_again(grad_ND)
        return grad_ND.new_empty(0), None


class Places(NamedTuple):
    """Which rows are which arrived token's.

    ``order_M``: the flat (token, choice) pair of each row; ``token_M``: its token; ``by_token_M``: rows by
    their tokens, those of token r from ``first_R[r]`` on.
    """

    order_M: Tensor
    token_M: Tensor
    by_token_M: Tensor
    first_R: Tensor


def place(local_RK: Tensor, rows: int) -> Places:
    """Rows sorted by expert, ties by arrival. ``local_RK``: experts as numbered here, -1 for others'."""
    here_RK = local_RK >= 0
    order_M = local_RK.masked_fill(~here_RK, torch.iinfo(local_RK.dtype).max).flatten().argsort(stable=True)
    order_M = order_M[:rows]
    counts_R = here_RK.sum(dim=1)
    return Places(order_M, order_M // local_RK.shape[1], order_M.argsort(), counts_R.cumsum(0) - counts_R)


def _sum(y_MD: Tensor, gates_M: Tensor | None, places: Places) -> Tensor:
    """Each token's sum of its rows, which differ in number: ``[R, D]``, always in the same order."""
    if not len(y_MD):
        return y_MD.new_empty(len(places.first_R), y_MD.shape[1])  # who arrives has rows: nobody did
    gates = None if gates_M is None else gates_M[places.by_token_M].to(y_MD.dtype)
    return F.embedding_bag(places.by_token_M, y_MD, places.first_R, mode="sum", per_sample_weights=gates)


class _Copy(torch.autograd.Function):
    """Arrived tokens to rows."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(*places)
        return x_RD.index_select(0, places.token_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_MD, None, Places(*ctx.saved_tensors)), None


class _Sum(torch.autograd.Function):
    """Rows to the weighted sum of each arrived token."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, gates_RK: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(y_MD, gates_RK, *places)
        return _sum(y_MD, gates_RK.flatten()[places.order_M], places)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_MD, gates_RK, order_M, token_M, *_ = ctx.saved_tensors
        grad_MD = grad_RD.index_select(0, token_M)
        grad_RK = torch.zeros_like(gates_RK)
        grad_RK.view(-1)[order_M] = (grad_MD.to(gates_RK.dtype) * y_MD).sum(dim=-1)
        return grad_MD * gates_RK.flatten()[order_M, None].to(grad_MD.dtype), grad_RK, None


@dataclass
class Travelling:
    """What the four steps of a layer's tokens share; the last two are known when tokens have arrived."""

    passage: Passage
    places: Places | None = None
    gates_RK: Tensor | None = None


class DeepEP:
    """A :class:`dsv3.model.moe.Dispatcher` through DeepEP's buffer of a group."""

    def __init__(self, buffer: Any, experts: int, traffic: Traffic, clock: Clock, fp8: bool = False):
        self.buffer, self.experts = buffer, experts
        self.traffic, self.clock, self.fp8 = traffic, clock, fp8

    @torch.compiler.disable
    def dispatch(self, x_ND: Tensor, routing: Routing, load_E: Tensor) -> tuple[Tensor, Tensor, Travelling]:
        """See :class:`dsv3.model.moe.Dispatcher`."""
        passage = Passage(self.buffer, self.clock, x_ND.dtype)
        ticket = _Dispatch.apply(x_ND, routing.gates_NK, routing.indices_NK, self.experts, self.fp8, passage)
        self.traffic.count(routing.indices_NK)
        return ticket, torch.tensor(passage.counts, device=load_E.device), Travelling(passage)

    @torch.compiler.disable
    def arrive(self, rows_MD: Tensor, handle: Travelling) -> Tensor:
        """See :class:`dsv3.model.moe.Dispatcher`."""
        x_RD, handle.gates_RK, local_RK = _Arrive.apply(rows_MD, handle.passage)
        handle.places = place(local_RK, sum(handle.passage.counts))
        return _Copy.apply(x_RD, handle.places)

    @torch.compiler.disable
    def combine(self, y_MD: Tensor, routing: Routing, handle: Travelling) -> Tensor:
        """See :class:`dsv3.model.moe.Dispatcher`."""
        return _Send.apply(_Sum.apply(y_MD, handle.gates_RK, handle.places), handle.passage)

    @torch.compiler.disable
    def settle(self, rows: Tensor, routing: Routing, handle: Travelling) -> Tensor:
        """See :class:`dsv3.model.moe.Dispatcher`."""
        return _Settle.apply(rows, handle.passage)
