"""A stand-in for ``deep_ep`` over gloo: its documented interface and meaning, and none of its kernels.

As strict as it can be: arguments have exactly the dtypes and shapes that DeepEP's host code asserts. What a
call writes is garbage until its event was waited for; the exchange happens then, as late as it may, and what
the call reads must still be there, unchanged. Calls run in the order they were made, as on one CUDA stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64
GARBAGE = -7777


class Config:
    """Settings of a kernel."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        raise AssertionError("NVSHMEM is disabled during compilation")


class EventOverlap:
    """What comes when a call is over."""

    def __init__(self, buffer: Buffer | None = None, number: int = 0):
        self.buffer, self.number = buffer, number

    def current_stream_wait(self) -> None:
        assert self.buffer is not None, "no event: the call was not asynchronous"
        self.buffer.run_to(self.number)


class Handle(tuple):
    """Who sent what to whom; only a buffer looks into it."""


class Buffer:
    """``log`` holds what was called and waited for, in order."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0):
        assert isinstance(group, dist.ProcessGroup) and num_nvl_bytes > 0 and num_rdma_bytes == 0
        self.group, self.ranks = group, group.size()
        self.bytes = num_nvl_bytes
        self.calls: list[tuple[str, Callable[[], None]]] = []
        self.done = 0
        self.log: list[str] = []

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def run_to(self, number: int) -> None:
        """Let the calls up to one happen."""
        while self.done <= number:
            _, run = self.calls[self.done]
            self.done += 1
            run()
        self.log.append(f"wait {self.calls[number][0]}")

    def _later(self, name: str, reads: list[Tensor], run: Callable[[list[Tensor]], None]) -> EventOverlap:
        held = [(weakref.ref(tensor), tensor._version) for tensor in reads]

        def happen() -> None:
            tensors = [reference() for reference, _ in held]
            for tensor, (_, version) in zip(tensors, held):
                assert tensor is not None, f"{name}: what it reads was let go before it was waited for"
                assert tensor._version == version, f"{name}: what it reads was changed under way"
            with torch.no_grad():
                run(tensors)  # type: ignore[arg-type]

        self.log.append(name)
        self.calls.append((name, happen))
        return EventOverlap(self, len(self.calls) - 1)

    def _exchange(self, out: Tensor, rows: Tensor, receive: list[int], send: list[int]) -> None:
        dist.all_to_all_single(
            out.view(torch.uint8), rows.contiguous().view(torch.uint8), receive, send, group=self.group
        )

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: Any = None, async_finish: bool = False
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t
        assert num_experts % self.ranks == 0
        chosen = torch.stack([(topk_idx == expert).any(dim=1) for expert in range(num_experts)], dim=1)
        in_rank = chosen.unflatten(1, (self.ranks, -1)).any(dim=2)
        to_rank, to_expert = in_rank.sum(dim=0).int(), chosen.sum(dim=0).int()
        return to_rank, None, to_expert, in_rank, EventOverlap()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        assert async_finish
        parts = list(x) if isinstance(x, tuple) else [x]
        assert all(part.dim() == 2 and part.is_contiguous() for part in parts)
        tokens, width = parts[0].shape
        assert width * parts[0].element_size() % 16 == 0
        if len(parts) == 2:
            assert parts[0].dtype == torch.float8_e4m3fn and parts[1].dtype == torch.float32
            assert parts[1].shape == (tokens, width // 128) and width % 128 == 0
        else:
            assert parts[0].dtype == torch.bfloat16
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            brought = self._brought(parts, sum(handle[1]))
            event = self._later("dispatch again", parts, lambda reads: self._out(reads, brought, handle))
            return (tuple(brought) if len(brought) > 1 else brought[0]), None, None, None, None, event

        assert num_tokens_per_rank is not None and num_tokens_per_expert is not None
        assert is_token_in_rank is not None and topk_idx is not None and topk_weights is not None
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert is_token_in_rank.dtype == torch.bool and is_token_in_rank.shape == (tokens, self.ranks)
        assert topk_idx.dtype == topk_idx_t and topk_weights.dtype == torch.float32
        assert topk_idx.shape == topk_weights.shape and len(topk_idx) == tokens
        assert topk_idx.is_contiguous() and topk_weights.is_contiguous()
        sent = [column.nonzero()[:, 0] for column in is_token_in_rank.unbind(dim=1)]
        assert [len(index) for index in sent] == num_tokens_per_rank.tolist()
        share = len(num_tokens_per_expert) // self.ranks
        sizes = torch.cat((num_tokens_per_rank[:, None], num_tokens_per_expert.view(self.ranks, -1)), dim=1)
        arriving = torch.empty_like(sizes)
        dist.all_to_all_single(arriving, sizes, group=self.group)
        receive, counts = arriving[:, 0].tolist(), arriving[:, 1:].sum(dim=0).tolist()
        made = Handle((sent, receive, tokens))
        reads = [*parts, topk_idx, topk_weights]
        brought = self._brought(reads, sum(receive))

        def run(reads: list[Tensor]) -> None:
            *parts, chosen, weights = reads
            self._out(parts, brought[:-2], made)
            send = [len(index) for index in sent]
            locals_, gates = [], []
            for rank, index in enumerate(sent):  # numbered as the receiver does, others' experts left out
                local = chosen[index] - rank * share
                others = (local < 0) | (local >= share)
                locals_.append(local.masked_fill(others, -1))
                gates.append(weights[index].masked_fill(others, 0.0))
            self._exchange(brought[-2], torch.cat(locals_), receive, send)
            self._exchange(brought[-1], torch.cat(gates), receive, send)

        event = self._later("dispatch", reads, run)
        *arrived, local, weights = brought
        return (tuple(arrived) if len(arrived) > 1 else arrived[0]), local, weights, counts, made, event

    def _brought(self, like: list[Tensor], rows: int) -> list[Tensor]:
        """Memory for what will arrive, with garbage in it."""
        made = [part.new_empty(rows, part.shape[1]) for part in like]
        for part in made:
            part.fill_(GARBAGE if part.dtype == topk_idx_t else float("nan"))
        return made

    def _out(self, parts: list[Tensor], brought: list[Tensor], handle: Handle) -> None:
        sent, receive, _ = handle
        for part, out in zip(parts, brought, strict=True):
            rows = torch.cat([part.view(torch.uint8)[index] for index in sent])
            self._exchange(out, rows, receive, [len(index) for index in sent])

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        assert async_finish
        sent, receive, tokens = handle
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16 and len(x) == sum(receive)
        reads = [x]
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
            assert topk_weights.dim() == 2 and len(topk_weights) == len(x)
            reads.append(topk_weights)
        brought = self._brought(reads, tokens)

        def run(reads: list[Tensor]) -> None:
            for part, out in zip(reads, brought, strict=True):
                send = [len(index) for index in sent]
                rows = part.new_empty(sum(send), part.shape[1])
                self._exchange(rows, part, send, receive)
                sums = torch.zeros(tokens, part.shape[1])
                for index, piece in zip(sent, rows.split(send)):
                    sums[index] += piece.float()
                out.copy_(sums)

        event = self._later("combine", reads, run)
        return brought[0], brought[1] if len(brought) > 1 else None, event
