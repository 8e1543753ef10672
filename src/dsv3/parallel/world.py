"""The processes of a run, as a trainer sees them; one process is a world of its own and nothing is sent."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3.common.errors import Failure, UserError
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelSection
from dsv3.parallel import experts
from dsv3.parallel.experts import Traffic
from dsv3.parallel.layout import Layout, Meshes, make_meshes, resolve
from dsv3.parallel.weights import FSDP, Piece, Weights, ZeRO1

GRACE_SECONDS = 5.0  # for the other ranks to say that they are still there, after a collective failed


@dataclass
class World:
    """Who takes part in a run. The default: this process alone."""

    layout: Layout = field(default_factory=Layout)
    meshes: Meshes | None = None
    zero: int = 1
    node_size: int = 1

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
        return 0 if self.meshes is None else self.meshes.place("data")

    @property
    def data_size(self) -> int:
        """Shares a batch is cut into."""
        return self.layout.data

    def spread(self, model: nn.Module, fp8: bool = False) -> tuple[Weights, dict[str, Traffic]]:
        """Apply the layout to a model (or a stage of one): what of its weights this rank updates; traffic.

        ``fp8``: rows travel to experts in FP8 (:class:`dsv3.parallel.experts.ExpertParallel`).
        """
        if self.meshes is None:
            return Weights(model), {}
        traffic = experts.apply(model, self.meshes, self.node_size, fp8)
        return (ZeRO1 if self.zero == 1 else FSDP)(model, self.meshes), traffic

    def add(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.meshes is None:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Everybody's numbers, by rank."""
        if self.meshes is None:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = mine.new_empty(self.size, len(mine))
        dist.all_gather_into_tensor(everyone.view(-1), mine)
        return [[float(x) for x in row] for row in everyone.tolist()]

    def norm(self, gradients: Sequence[tuple[Tensor, int]]) -> float:
        """The norm of all gradients; of each piece how many ranks have a copy is given."""
        norms = torch.stack(torch._foreach_norm([gradient for gradient, _ in gradients]))
        if self.meshes is None:
            return float(norms.norm())
        copies = torch.tensor([copies for _, copies in gradients], device=norms.device)
        return float(self.add((norms.double().square() / copies).sum()).sqrt())

    @property
    def device(self) -> torch.device:
        """Where small tensors that are sent lie."""
        assert self.meshes is not None
        kind = self.meshes.whole.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def barrier(self) -> None:
        """Wait for everybody."""
        self.add(torch.zeros((), device=self.device if self.meshes else None))

    def blame(self, error: Exception, doing: str) -> Failure:
        """After a collective failed: a :class:`Failure` that names the ranks that no longer answer.

        Everybody whose collective failed says so in the launcher's store; who is hung or dead does not.
        """
        assert self.meshes is not None
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
            return Failure(f"a collective failed while {doing}, every rank answers: {reason}")
        named = ", ".join(map(str, sorted(silent)))
        return Failure(
            f"rank {named} does not answer while {doing} (seen from rank {self.rank}: {reason}); torchrun "
            "--max-restarts N starts again, --resume auto goes on from the last checkpoint"
        )

    def close(self) -> None:
        """Leave."""
        if self.meshes is not None:
            dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """This process's device of a kind: of several GPUs the one torchrun's LOCAL_RANK says."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


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
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=section.timeout_seconds))
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(layout, make_meshes(layout, device.type), section.zero, node_size)


__all__ = ["Piece", "World", "enter", "local_device"]
