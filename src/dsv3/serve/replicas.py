"""Redundant experts in a running engine (report 3.4): loads measured, copies where they are needed.

Each layer's experts lie in physical slots, the slots in shards (a GPU each; here all in one process), and an
expert of heavy load has several slots. The dispatcher deals the rows of an expert to its slots in turn. From
time to time :meth:`Replicas.rebalance` chooses a new placement for the loads measured and copies weights.

That changes no answer: a copy multiplies as its original does, and packed products have one order of sums, so
that a row's result does not depend on which rows are beside it (``ops/packed.py``; where there is no
compiler, and for FP8 weights, BLAS may round small groups of rows differently).

Shapes: N tokens, D hidden, K chosen experts, M = N K rows, E experts, R replicas of one, P slots, L layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsv3.common.errors import UserError
from dsv3.model.linear import Experts
from dsv3.model.moe import LocalDispatcher, Routing
from dsv3.ops.permute import expert_order, gather_rows
from dsv3.quant.packed import PackedExperts
from dsv3.serve.engine import Engine
from dsv3.serve.placement import Placement, imbalance, place

HALF_LIFE = 100_000  # tokens after which a load counts half


class Spread(LocalDispatcher):
    """Deals the rows of each expert to its slots in turn, and counts.

    ``load_E``: rows of each expert, where those of ``half_life`` tokens ago count half. ``busiest``,
    ``even``: rows of the busiest shard and of the mean shard, summed over the steps since the last placement.
    """

    def __init__(self, experts: int, shards: int, half_life: float, device: torch.device):
        self.shards, self.half_life = shards, half_life
        self.load_E = torch.zeros(experts, dtype=torch.float64, device=device)
        self.turn_E = torch.zeros(experts, dtype=torch.int64, device=device)
        self.busiest = torch.zeros((), dtype=torch.int64, device=device)
        self.even = torch.zeros((), dtype=torch.float64, device=device)

    def place(self, where_ER: np.ndarray, counts_E: np.ndarray) -> None:
        """Deal to these slots from now on."""
        device = self.load_E.device
        self.slots = int(counts_E.sum())
        self.where_ER = torch.from_numpy(where_ER).to(device)
        self.counts_E = torch.from_numpy(counts_E).to(device)
        self.busiest.zero_()
        self.even.zero_()

    def dispatch(self, x_ND: Tensor, routing: Routing, load_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See :class:`dsv3.model.moe.Dispatcher`; rows are sorted by slot."""
        chosen_M = routing.indices_NK.flatten()
        _, inverse_M = expert_order(chosen_M)
        before_E = load_E.cumsum(0) - load_E
        turn_M = inverse_M - before_E[chosen_M] + self.turn_E[chosen_M]
        slots_M = self.where_ER[chosen_M, turn_M % self.counts_E[chosen_M]]
        counts_P = torch.bincount(slots_M, minlength=self.slots)
        self.turn_E += load_E
        self.load_E.mul_(0.5 ** (len(x_ND) / self.half_life)).add_(load_E)
        shards = counts_P.view(self.shards, -1).sum(dim=1)
        self.busiest += shards.max()
        self.even += len(chosen_M) / self.shards
        order = expert_order(slots_M.view_as(routing.indices_NK))
        return gather_rows(x_ND, *order), counts_P, order


@dataclass(frozen=True)
class Moved:
    """``slots`` that hold another expert now, ``nbytes`` copied for that; the busiest shard's load over the
    mean, by the loads measured, in the old placement and the new (mean over the layers)."""

    slots: int
    nbytes: int
    before: float
    after: float


class Replicas:
    """Puts an engine's experts into ``slots`` physical slots of ``shards`` shards on ``nodes`` nodes.

    The engine leaves the compiled way through the layers, which knows no slots. Raises :class:`UserError` for
    a model without experts and for sizes that do not divide.
    """

    def __init__(self, engine: Engine, slots: int, shards: int, nodes: int = 1, half_life: float = HALF_LIFE):
        if not half_life > 0:
            raise UserError(f"half_life ({half_life}) must be above 0 tokens")
        config = engine.model.config
        self.layers = engine.model.moe_layers()
        if not self.layers:
            raise UserError("redundant experts need a model with experts; this one has dense layers only")
        self.shards, self.nodes, self.groups = shards, nodes, config.n_group
        unknown = np.ones((len(self.layers), config.n_routed_experts))
        self.placement = place(unknown, slots, self.groups, nodes, shards)
        self.dispatchers: list[Spread] = []
        for moe, slots_P in zip(self.layers.values(), self.placement.physical_to_logical_LP):
            if type(moe.experts) is Experts:
                gate, up, down = moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj
                moe.experts = PackedExperts(gate.weight, up.weight, down.weight)
            _into_slots(moe.experts, torch.from_numpy(slots_P))
            self.dispatchers.append(
                Spread(config.n_routed_experts, shards, half_life, moe.gate.weight.device)
            )
            moe.dispatcher = self.dispatchers[-1]
        self._tell()
        engine.runner.layers.refresh()
        if engine.drafter:
            engine.drafter.layers.refresh()

    def loads(self) -> np.ndarray:
        """Rows of each expert, ``[L, E]``, the older ones counting less."""
        return np.stack([dispatcher.load_E.cpu().numpy() for dispatcher in self.dispatchers])

    def imbalance(self) -> np.ndarray:
        """What the steps since the last placement had to wait for, ``[L]``: the busiest shard's rows, step by
        step, over the mean shard's. 1 is even; nan before the first step."""
        busiest, even = (
            np.array([float(getattr(dispatcher, name)) for dispatcher in self.dispatchers])
            for name in ("busiest", "even")
        )
        return np.divide(busiest, even, out=np.full(len(even), np.nan), where=even > 0)

    def rebalance(self) -> Moved:
        """Place the experts by the loads measured. To be called between steps.

        A layer whose placement is as good already keeps it.
        """
        load_LE, old = self.loads(), self.placement
        slots = old.physical_to_logical_LP.shape[1]
        new = place(load_LE, slots, self.groups, self.nodes, self.shards)
        before, after = (imbalance(one.gpu_loads(load_LE, self.shards)) for one in (old, new))
        better = after < before
        self.put(np.where(better[:, None], new.physical_to_logical_LP, old.physical_to_logical_LP))
        changed = self.placement.physical_to_logical_LP != old.physical_to_logical_LP
        sizes = [sum(t.nbytes for _, _, t in _stacks(moe.experts)) // slots for moe in self.layers.values()]
        return Moved(
            int(changed.sum()),
            int((changed.sum(axis=1) * sizes).sum()),
            float(before.mean()),
            float(np.minimum(before, after).mean()),
        )

    @torch.no_grad()
    def put(self, physical_to_logical_LP: np.ndarray) -> None:
        """Have these experts in the slots, but for their order within a shard: what is there stays."""
        old = self.placement
        settled = [
            _settle(then, now, self.shards)
            for then, now in zip(old.physical_to_logical_LP.tolist(), physical_to_logical_LP.tolist())
        ]
        self.placement = Placement.of(np.array(settled), old.counts_LE.shape[1])
        for layer, moe in enumerate(self.layers.values()):
            then, now = old.physical_to_logical_LP[layer], self.placement.physical_to_logical_LP[layer]
            changed = np.flatnonzero(then != now)
            if len(changed):
                source = torch.from_numpy(old.logical_to_physical_LER[layer, now[changed], 0])
                for _, _, stack in _stacks(moe.experts):
                    fresh = stack.index_select(0, source.to(stack.device))  # before any is overwritten
                    stack[torch.from_numpy(changed).to(stack.device)] = fresh
        self._tell()

    def _tell(self) -> None:
        found = zip(self.placement.logical_to_physical_LER, self.placement.counts_LE)
        for dispatcher, (where_ER, counts_E) in zip(self.dispatchers, found):
            dispatcher.place(where_ER, counts_E)


def _stacks(experts: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every tensor of a layer's experts that has one part an expert: where it is, its name, itself."""
    for module in experts.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            yield module, name, tensor


@torch.no_grad()
def _into_slots(experts: nn.Module, slots_P: Tensor) -> None:
    """``[E, ...]`` to ``[P, ...]``, the expert ``slots_P[p]`` in slot p."""
    for module, name, tensor in list(_stacks(experts)):
        stack = tensor.index_select(0, slots_P.to(tensor.device))
        setattr(module, name, nn.Parameter(stack) if isinstance(tensor, nn.Parameter) else stack)


def _settle(then: list[int], now: list[int], shards: int) -> list[int]:
    """``now``, its order within each shard changed so that experts stay in their slots."""
    size, found = len(now) // shards, []
    for first in range(0, len(now), size):
        wanted = Counter(now[first : first + size])
        kept: list[int | None] = []
        for expert in then[first : first + size]:
            stays = wanted[expert] > 0
            wanted[expert] -= stays
            kept.append(expert if stays else None)
        newcomers = iter(wanted.elements())
        found += [next(newcomers) if expert is None else expert for expert in kept]
    return found
