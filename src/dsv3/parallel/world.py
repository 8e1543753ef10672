"""The processes of a run, as a trainer sees them; one process is a world of its own and nothing is sent."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3.checkpoint.distributed import file_names
from dsv3.common.errors import Failure, UserError
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelSection
from dsv3.data.loader import Batch
from dsv3.model import DeepSeekV3
from dsv3.ops.squares import sums_of_squares
from dsv3.parallel import context, experts
from dsv3.parallel.clock import Clock
from dsv3.parallel.collectives import all_gather
from dsv3.parallel.layout import Layout, Meshes, make_meshes, resolve
from dsv3.parallel.pipeline import Pipeline
from dsv3.parallel.traffic import Traffic
from dsv3.parallel.weights import FSDP, Piece, Weights, ZeRO1

GRACE_SECONDS = 5.0  # for the other ranks to say that they are still there, after a collective failed


@dataclass
class World:
    """Who takes part in a run. The default: this process alone.

    ``beside``: a group of all over the CPU's network, for what goes on beside training (checkpoints).
    """

    layout: Layout = field(default_factory=Layout)
    meshes: Meshes | None = None
    zero: int = 1
    schedule: str = "dualpipev"
    node_size: int = 1
    beside: dist.ProcessGroup | None = None
    clock: Clock = field(default_factory=Clock)

    @property
    def waited(self) -> float:
        """Seconds this process has waited for others' rows, gradients and numbers."""
        return self.clock.seconds

    @property
    def rank(self) -> int:
        """This process's number."""
        return 0 if self.meshes is None else self.meshes.rank

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.layout.world

    @property
    def is_first(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of every batch this process reads."""
        return 0 if self.meshes is None else self.meshes.place("data") // self.layout.context

    @property
    def data_size(self) -> int:
        """Shares a batch is cut into."""
        return self.layout.readers

    def part_length(self, length: int) -> int:
        """Tokens of a row that this rank works on, of a sequence of ``length``."""
        return length if self.layout.context == 1 else length // (2 * self.layout.context)

    def part(self, batch: Batch, length: int) -> Batch:
        """What this rank works on of its share of a batch: all of it, or its parts of the sequences."""
        if self.meshes is None or self.meshes.context is None:
            return batch
        return context.part(batch, length, dist.get_rank(self.meshes.context), self.layout.context)

    def cut(self, model: DeepSeekV3, length: int) -> Pipeline | None:
        """This rank's stages of a pipeline, None without one; the model's other layers lose their memory.

        ``length``: tokens of a sequence. Call it before :meth:`spread`.
        """
        if self.meshes is None or self.layout.pipeline == 1:
            return None
        group, rows = self.meshes.group("pipeline"), self.part_length(length)
        pipeline = Pipeline(model, self.schedule, group, rows, length)
        kept = {id(p) for p in pipeline.part.parameters()}
        for module in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
            if not any(id(p) in kept for p in module.parameters()):
                module.to("meta")
        return pipeline

    def spread(
        self, model: DeepSeekV3, pipeline: Pipeline | None = None, fp8: bool = False
    ) -> tuple[Weights, dict[str, Traffic]]:
        """Apply the layout to a model, or to this rank's part of it: what of it this rank updates; traffic.

        ``fp8``: rows travel to experts in FP8 (:class:`dsv3.parallel.experts.ExpertParallel`).
        """
        if self.meshes is None:
            return Weights(model), {}
        part: nn.Module = model if pipeline is None else pipeline.part
        if self.meshes.context is not None:
            context.apply(model, self.meshes.context, self.clock)
        embedding = model.model.embed_tokens
        dtype = embedding.compute_dtype or embedding.weight.dtype
        traffic = experts.apply(part, self.meshes, self.node_size, fp8, self.clock, dtype)
        weights = (ZeRO1 if self.zero == 1 else FSDP)(part, self.meshes)
        for name in pipeline.repeated if pipeline is not None else ():
            assert pipeline is not None
            weights.pieces[name].copies *= 2
            weights.elsewhere = set() if pipeline.part.begins else {name}
        return weights, traffic

    def share(self, model: DeepSeekV3, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes of a whole model, by file names: every tensor is one rank's.

        The experts it was dealt, unless a rank before it has the same; of the other tensors of its stage
        a turn. Ranks take part together: shards are gathered one tensor at a time.
        """
        assert self.meshes is not None
        turn = 0
        for name, tensor in chain(weights.here(), biases(model)):
            if ".mlp.experts." in name:
                own = self.meshes.place("replicate") == self.meshes.place("expert_shard") == 0
                first = self.meshes.place("expert") * len(tensor)
            else:
                own, first = turn % self.layout.data == self.meshes.place("data"), 0
                turn += 1
            if own and name not in weights.elsewhere:
                for file_name, part in file_names(name, tensor, first, model.config):
                    yield file_name, part.to("cpu")

    def add(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.meshes is None:
            return values
        total = values.clone()
        with self.clock.waiting("in a sum over all ranks"):
            dist.all_reduce(total)
        return total

    def add_data(self, values: Tensor) -> Tensor:
        """The sum over this stage's data ranks: of what all its pipeline ranks know alike."""
        if self.meshes is None:
            return values
        total = values.to(self.device)
        with self.clock.waiting("in a sum over data ranks"):
            dist.all_reduce(total, group=self.meshes.group("data"))
        return total.to(values.device)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Everybody's numbers, by rank."""
        if self.meshes is None:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = mine.new_empty(self.size, len(mine))
        with self.clock.waiting("in the gathering of numbers"):
            all_gather(everyone.view(-1), mine)
        return [[float(x) for x in row] for row in everyone.tolist()]

    def exchange(self, value: Any) -> list[Any]:
        """Everybody's value by rank, of the kinds that JSON holds."""
        if self.meshes is None:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [int(size) for (size,) in self.gather([len(own)])]
        padded = own.new_zeros(max(sizes))
        padded[: len(own)] = own
        everyone = own.new_empty(self.size, len(padded))
        with self.clock.waiting("in an exchange of texts"):
            all_gather(everyone.view(-1), padded)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(everyone.cpu(), sizes)]

    def norm(self, pieces: Iterable[Piece]) -> float:
        """The norm of everybody's gradients; what several ranks have is counted once."""
        counted = [(p.local.grad, p.copies) for p in pieces if p.local.grad is not None]
        squares = sums_of_squares([gradient for gradient, _ in counted])
        copies = torch.tensor([copies for _, copies in counted], device=squares.device)
        return float(self.add((squares / copies).sum()).sqrt())

    @property
    def device(self) -> torch.device:
        """Where small tensors that are sent lie."""
        assert self.meshes is not None
        kind = self.meshes.whole.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def barrier(self) -> None:
        """Wait for everybody."""
        self.add(torch.zeros((), device=self.device if self.meshes else None))

    def lost(self, error: Exception) -> bool:
        """Whether an error is a collective's: somebody is gone or late."""
        signs = ("gloo", "NCCL", "DeepEP", "Timed out", "Connection", "connection")
        return self.meshes is not None and (
            isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
        )

    def blame(self, error: Exception, doing: str) -> Failure:
        """After a collective failed: a :class:`Failure` that names the ranks that no longer answer.

        Everybody whose collective failed says so in the launcher's store; who is hung or dead does not.
        """
        assert self.meshes is not None
        if self.clock.what:
            doing = f"{doing}, {self.clock.what}"
        store = dist.distributed_c10d._get_default_store()
        silent = set(range(self.size))
        with suppress(RuntimeError):  # the store may be gone with its host
            store.set(f"failed/{self.rank}", doing)
            end = time.monotonic() + GRACE_SECONDS
            while silent and time.monotonic() < end:
                silent -= {rank for rank in silent if store.check([f"failed/{rank}"])}
                time.sleep(0.05)
        reason = str(error).splitlines()[0]
        if not silent:
            return Failure(f"a collective failed {doing}, every rank answers: {reason}")
        named = ", ".join(map(str, sorted(silent)))
        return Failure(
            f"rank {named} does not answer {doing} (seen from rank {self.rank}: {reason}); torchrun "
            "--max-restarts N starts again, --resume auto goes on from the last checkpoint"
        )

    def close(self) -> None:
        """Leave, when nothing more is to be sent."""
        if self.meshes is not None:
            dist.destroy_process_group()


def biases(model: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """The experts' selection biases of the layers that are here, by name."""
    for layer, moe in model.moe_layers().items():
        if not moe.gate.e_score_correction_bias.is_meta:
            yield f"model.layers.{layer}.mlp.gate.e_score_correction_bias", moe.gate.e_score_correction_bias


def local_device(device: torch.device) -> torch.device:
    """This process's own: of several GPUs the one torchrun's LOCAL_RANK says."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def _meet(backend: str, timeout: timedelta) -> None:
    """Make the default process group.

    After a restart torchrun's launcher may still hold the addresses that dead processes left in its store
    (torch 2.13 with static rendezvous, its default): every attempt gets keys of its own.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"dsv3/attempt-{attempt}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)


def enter(section: ParallelSection, config: ModelConfig, device: torch.device) -> World:
    """The world torchrun made (its environment variables), laid out as the recipe asks.

    Raises :class:`UserError` where the layout does not fit processes and model, before anything is sent.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = resolve(section, config, size)
    if size == 1:
        return World()
    if layout.pipeline > 1 and section.zero == 3:
        raise UserError(
            "parallel.zero (3) gathers weights layer by layer, a pipeline (parallel.pipeline "
            f"{layout.pipeline}) runs its layers in pieces: use --parallel.zero 1"
        )
    if not dist.is_initialized():
        _meet("nccl" if device.type == "cuda" else "gloo", timedelta(seconds=section.timeout_seconds))
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    meshes = make_meshes(layout, device.type)
    beside = dist.new_group(backend="gloo", timeout=timedelta(seconds=section.timeout_seconds))
    return World(layout, meshes, section.zero, section.schedule, node_size, beside)


__all__ = ["World", "biases", "enter", "local_device"]
