"""A model over pipeline ranks: cut, split, scheduled (report 3.2.1).

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining.schedules import (
    OVERLAP_F_B,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from dsv3.common.errors import UserError
from dsv3.data.loader import Batch
from dsv3.data.targets import labels
from dsv3.model import DeepSeekV3
from dsv3.model.linear import Embedding
from dsv3.model.loss import Losses, Share
from dsv3.ops.cross_entropy import IGNORE
from dsv3.parallel.pipeline import split
from dsv3.parallel.pipeline.cut import V_SHAPED, costs, cut, stages_of
from dsv3.parallel.pipeline.slice import Part, Slice, Work
from dsv3.parallel.pipeline.stage import Stage, Trace, overlapped

_SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Pipeline:
    """This rank's part of ``model`` and the schedule that runs it over ``group``.

    :attr:`part` holds this rank's pieces, the model's own modules and names: shard and optimise that. Drop
    the model, and what is not of this rank goes with it. Apply number formats and recomputation to the model
    before. Zero bubbles and overlap come from the schedule: W apart from B in zbv and dualpipev; in dualpipev
    a forward and a backward take turns while rows travel between experts.

    The MTP modules sit with the head in the last stage. In a V (zbv, dualpipev) that is on the rank of the
    embedding, which they share, as in the report; elsewhere the last rank has a copy, and both get the sum of
    their gradients.

    ``length``: tokens of a row that travels. ``sequence``: those of a sequence, for the costs by which the
    model is cut, where rows are parts of one.

    Raises :class:`UserError` where the model has too few layers.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        schedule: str,
        group: dist.ProcessGroup,
        length: int,
        sequence: int | None = None,
    ):
        self.config, self.schedule, self.group, self.length = model.config, schedule, group, length
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.stages = stages_of(schedule, self.rank, self.ranks)
        self.cut = cut(costs(model, sequence or length), schedule, self.ranks)
        embedding = model.model.embed_tokens
        self.dtype = embedding.compute_dtype or embedding.weight.dtype
        self.depths = len(model.mtp_modules)
        pieces = [piece for stage in self.stages for piece in self.cut[stage]]
        ends = len(self.cut) - 1 in self.stages
        self._two_embeddings = self.depths > 0 and schedule not in V_SHAPED and self.ranks > 1
        copied = _copied(embedding) if ends and self._two_embeddings else None
        self.part = Part(model, pieces, copied)
        self.slices = [
            Slice(
                model,
                self.cut[stage],
                copied if stage == len(self.cut) - 1 else None,
                embedding if ends and copied is None and 0 not in self.cut[stage] else None,
            )
            for stage in self.stages
        ]
        for module in self.slices:
            split.apply(module, module.gradients)
        self.trace = Trace()
        self._built: tuple[Any, ...] | None = None

    @property
    def repeated(self) -> dict[str, nn.Parameter]:
        """Parameters that this rank and another pipeline rank have, by name: the embedding and its copy."""
        found = self.part.named_parameters() if self._two_embeddings else ()
        return {name: p for name, p in found if name == "model.embed_tokens.weight"}

    def accumulate(self, batches: list[Batch], share: Share, mtp_weight: float) -> Losses:
        """Forward and backward of a step: gradients are left in the parameters.

        ``batches``: this data rank's micro-batches of the step, on this rank's device, the same on every rank
        of the group, all of one shape. Returns this rank's part of the losses, sums over the micro-batches
        (zero where it has none), and the loads of its layers: summed over ranks they are the step's.
        Raises :class:`UserError` where the schedule wants more micro-batches.
        """
        device = batches[0].tokens_BT.device
        work = Work(batches, self.length, share, mtp_weight)
        for module in self.slices:
            module.work = work
        runner = self._runner(len(batches), len(batches[0].tokens_BT), device)
        numbers = torch.arange(len(batches))
        runner.step(micro=numbers, target=numbers, losses=[], return_outputs=False)
        self._add_embedding_gradients()
        return work.losses(self.depths, device)

    @torch.no_grad()
    def read(self, rows: Batch, sequences: int = 8) -> float:
        """Mean loss of the next token over held-out rows, nats; the same on every rank of the group.

        Slice after slice, ``sequences`` at a time; nothing overlaps. Every rank has the same rows.
        """
        device = next(self.part.parameters()).device
        length = rows.tokens_BT.shape[1] - 1 - self.depths  # whole sequences, also where training cuts them
        count = len(rows.tokens_BT)
        batches = [rows.slice(at, at + sequences).to(device) for at in range(0, count, sequences)]
        tokens = sum(int((labels(batch, length, 0) != IGNORE).sum()) for batch in batches)
        work = Work(batches, length, Share([tokens], count), mtp_weight=0.0)
        slices = dict(zip(self.stages, self.slices))
        owners = {s: rank for rank in range(self.ranks) for s in stages_of(self.schedule, rank, self.ranks)}
        for module in self.slices:
            module.work = work
        for micro, batch in enumerate(batches):
            x = None
            for stage in sorted(slices):
                before, after = owners.get(stage - 1, self.rank), owners.get(stage + 1, self.rank)
                if before != self.rank:
                    shape = (len(batch.tokens_BT), length, self.config.hidden_size)
                    x = torch.empty(shape, dtype=self.dtype, device=device)
                    dist.recv(x, group=self.group, group_src=before)
                x = slices[stage](x, micro=micro)
                if after != self.rank:
                    dist.send(x.contiguous(), group=self.group, group_dst=after)
        loss = work.losses(self.depths, device).main
        dist.all_reduce(loss, group=self.group)
        return float(loss)

    def _runner(self, micro_batches: int, sequences: int, device: torch.device) -> Any:
        """The schedule for so many micro-batches of this shape: as a rule the one of the step before."""
        key = (micro_batches, sequences, device)
        if self._built is not None and self._built[0] == key:
            return self._built[1]
        self._check(micro_batches)
        stream = torch.empty(sequences, self.length, self.config.hidden_size, dtype=self.dtype, device=device)
        stepped = self.schedule == "dualpipev"
        stages = [
            Stage(module, index, len(self.cut), self.group, stream, stepped, self.trace)
            for index, module in zip(self.stages, self.slices)
        ]
        runner = _SCHEDULES[self.schedule](
            stages[0] if self.schedule == "1f1b" else stages,
            n_microbatches=micro_batches,
            loss_fn=lambda output, target: output,  # the last slice makes the loss itself
            scale_grads=False,  # losses are shares of the step's
        )
        if stepped:
            runner.register_custom_function(OVERLAP_F_B, overlapped)
        self._built = (key, runner)
        return runner

    def divided(self, batches: list[Batch]) -> list[Batch]:
        """The batches in as many equal pieces as the schedule wants at least; the same gradients in sum."""
        rows = len(batches[0].tokens_BT)
        for pieces in (n for n in range(1, rows + 1) if rows % n == 0):
            if self._misfit(len(batches) * pieces) is None:
                step = rows // pieces
                return [batch.slice(at, at + step) for batch in batches for at in range(0, rows, step)]
        return batches

    def _misfit(self, micro_batches: int) -> str | None:
        """What the schedule wants and does not get with so many micro-batches."""
        stages = len(self.cut)
        least = {"1f1b": stages, "dualpipev": stages}.get(self.schedule, 1)
        if micro_batches < least:
            return (
                f"schedule {self.schedule} with {self.ranks} pipeline ranks needs {least} micro-batches a "
                f"step, there are {micro_batches}: raise batch.sequences, lower batch.micro_sequences, or "
                "use zbv"
            )
        if self.schedule == "interleaved" and micro_batches % self.ranks:
            return (
                f"schedule interleaved needs a multiple of its pipeline ranks ({self.ranks}) as "
                f"micro-batches, there are {micro_batches}: change batch.sequences or batch.micro_sequences"
            )
        return None

    def _check(self, micro_batches: int) -> None:
        if why := self._misfit(micro_batches):
            raise UserError(why)

    @torch.no_grad()
    def _add_embedding_gradients(self) -> None:
        """Both copies of the embedding get the sum of their gradients, and so stay equal."""
        # The first stage is on rank 0, the last one on the last rank.
        other = dist.get_global_rank(self.group, self.ranks - 1 if self.rank == 0 else 0)
        for weight in self.repeated.values():
            if weight.grad is None:  # the step was without MTP
                weight.grad = torch.zeros_like(weight)
            theirs = torch.empty_like(weight.grad)
            exchange = [
                dist.P2POp(dist.isend, weight.grad, other, self.group),
                dist.P2POp(dist.irecv, theirs, other, self.group),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            weight.grad += theirs


def _copied(embedding: Embedding) -> Embedding:
    with torch.device("meta"):
        copied = Embedding(*embedding.weight.shape)
    copied.weight = nn.Parameter(embedding.weight.detach().clone())
    copied.compute_dtype = embedding.compute_dtype
    return copied
