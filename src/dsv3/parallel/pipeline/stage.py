"""A slice as the schedules of ``torch.distributed.pipelining`` run it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from dsv3.parallel.pipeline.slice import Slice
from dsv3.parallel.pipeline.steps import Cuts, Steps, finish, take_turns


@dataclass
class Trace:
    """What ran when, while ``on``: ``(jobs, start, end)`` in seconds of ``time.perf_counter``.

    A job is ``(stage, kind, micro-batch)``, kind F, B (whole), I (inputs) or W (weights); two of them ran
    overlapped.
    """

    on: bool = False
    ran: list[tuple[tuple[tuple[int, str, int], ...], float, float]] = field(default_factory=list)

    @contextmanager
    def note(self, *jobs: tuple[int, str, int]) -> Iterator[None]:
        """Note jobs that run inside."""
        start = time.perf_counter()
        yield
        if self.on:
            self.ran.append((jobs, start, time.perf_counter()))


class Stage(PipelineStage):
    """Stage ``index`` of ``count``. Weight gradients wait for the schedule's W, where it has one.

    ``stepped``: passes stop while rows travel, so that the schedule may overlap two of them. Shapes are given
    (``stream``: an example of what travels), not found out by a trial pass: with weight gradients that wait a
    trial would leave its own behind.
    """

    def __init__(
        self,
        module: Slice,
        index: int,
        count: int,
        group: dist.ProcessGroup,
        stream: Tensor,
        stepped: bool,
        trace: Trace,
    ):
        self.gradients = module.gradients
        scalar = torch.empty((), device=stream.device)
        super().__init__(
            module,
            index,
            count,
            stream.device,
            input_args=scalar if index == 0 else stream.clone().requires_grad_(),
            output_args=(scalar if index == count - 1 else stream.clone()).requires_grad_(),
            group=group,
            dw_builder=self.gradients.take,
        )
        self.stepped, self.trace = stepped, trace
        self.cuts: dict[int, Cuts] = {}

    # Buffers that a stage receives into are made when they are needed and let go after: torch makes one for
    # every micro-batch of the step and keeps them all.

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """See :class:`PipelineStage`."""
        _make(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """See :class:`PipelineStage`."""
        if not self.is_last:
            _make(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        for infos in self.args_recv_info.values():
            _let_go(infos)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        for infos in self.grad_recv_info.values():
            _let_go(infos)

    def forward_steps(self, chunk: int) -> Steps[Tensor]:
        """The forward pass of a micro-batch."""
        inputs = () if self.is_first else self._retrieve_recv_activations(chunk)
        cuts = self.cuts[chunk] = Cuts()
        x = inputs[0] if inputs else None
        out = yield from cast(Slice, self.submod).steps(x, chunk, cuts)
        self.fwd_cache[chunk] = ((out,), list(inputs))
        _let_go(self.args_recv_info[chunk])
        return out

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Tensor:
        """See :class:`PipelineStage`."""
        with self.trace.note((self.stage_index, "F", fwd_chunk_id)):
            if self.stepped:
                return finish(self.forward_steps(fwd_chunk_id))
            out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
            _let_go(self.args_recv_info[fwd_chunk_id])
            return out

    def backward_steps(self, chunk: int) -> Steps[None]:
        """The backward pass of a micro-batch, as far as weight gradients do not wait."""
        (out,), inputs = self.fwd_cache.pop(chunk)
        grads = (None,) if self.is_last else self._retrieve_recv_grads(chunk)
        yield from self.cuts.pop(chunk).backward((out,), grads)
        self.bwd_cache[chunk] = tuple(x.grad for x in inputs)
        for x in inputs:
            x.grad = None

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """See :class:`PipelineStage`. A full backward computes weight gradients as it goes."""
        with self.trace.note((self.stage_index, "B" if full_backward else "I", bwd_chunk_id)):
            self.gradients.waiting = not full_backward
            if self.stepped:
                finish(self.backward_steps(bwd_chunk_id))
                if not full_backward:
                    self.dw_runner[bwd_chunk_id] = self.gradients.take()
            else:
                super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            if not self.is_last:
                _let_go(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """See :class:`PipelineStage`."""
        with self.trace.note((self.stage_index, "W", bwd_chunk_id)):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


def _make(infos: tuple[Any, ...], device: torch.device) -> None:
    for info in infos:
        if not info.is_root_arg:
            info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=device)


def _let_go(infos: tuple[Any, ...]) -> None:
    for info in infos:
        info.buffer = None


def overlapped(action: Any, context: Any) -> None:
    """Run a schedule's F&B action: a forward and a backward of two stages of this rank, taking turns."""
    schedule = context.schedule_ref
    forward, backward = action.sub_actions
    stages: dict[int, Stage] = {stage.stage_index: stage for stage in schedule._stages}

    def run_forward() -> Steps[None]:
        index, chunk = forward.stage_index, forward.microbatch_index
        stage = stages[index]
        out = yield from stage.forward_steps(chunk)
        schedule._maybe_compute_loss(stage, out, context.target_mbs, chunk)
        if index + 1 in stages:
            stages[index + 1].set_local_fwd_input(out, chunk)

    def run_backward() -> Steps[None]:
        index, chunk = backward.stage_index, backward.microbatch_index
        stage = stages[index]
        stage.gradients.waiting = False
        schedule.backward_counter[index] += 1
        yield from stage.backward_steps(chunk)
        if not stage.is_last:
            _let_go(stage.grad_recv_info[chunk])
        if index - 1 in stages:
            stages[index - 1].set_local_bwd_input(stage.get_local_bwd_output(chunk), chunk)

    for received, job in ((schedule.fwd_recv_ops, forward), (schedule.bwd_recv_ops, backward)):
        for work in received.pop((job.stage_index, job.microbatch_index), ()):
            work.wait()
    jobs = [(job.stage_index, kind, job.microbatch_index) for job, kind in ((forward, "F"), (backward, "B"))]
    with stages[forward.stage_index].trace.note(*jobs):
        take_turns(run_forward(), run_backward())
