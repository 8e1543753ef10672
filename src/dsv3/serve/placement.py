"""Which expert lies on which GPU, and which are there more than once (report 3.4: redundant experts).

Written after DeepSeek's EPLB. From the loads of the experts follow three steps a layer:

1. groups of experts are packed to nodes, so that group-limited routing keeps a token's traffic inside few
   nodes;
2. inside a node the spare slots go, one by one, to the expert whose replicas carry most each;
3. the replicas of a node are packed to its GPUs.

That is the hierarchical policy, for groups that divide evenly among the nodes (prefill: few GPUs). Otherwise
the global one: the same with one node and one group (decoding: many GPUs).

Shapes: L layers, E experts, P physical slots (GPU by GPU), R replicas of the most replicated expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsv3.common.errors import UserError


@dataclass(frozen=True)
class Placement:
    """``physical_to_logical_LP``: the expert in each slot; slots are numbered GPU by GPU.

    ``logical_to_physical_LER``: the slots of each expert, ascending, then -1. ``counts_LE``: how many it has.
    """

    physical_to_logical_LP: np.ndarray
    logical_to_physical_LER: np.ndarray
    counts_LE: np.ndarray

    @classmethod
    def of(cls, physical_to_logical_LP: np.ndarray, experts: int) -> Placement:
        """The placement with these experts in its slots."""
        slots_LP = np.asarray(physical_to_logical_LP, dtype=np.int64)
        counts_LE = np.stack([np.bincount(slots_P, minlength=experts) for slots_P in slots_LP])
        where_LER = np.full((*counts_LE.shape, counts_LE.max()), -1, dtype=np.int64)
        for where_ER, slots_P in zip(where_LER, slots_LP):
            for expert in range(experts):
                found = np.flatnonzero(slots_P == expert)
                where_ER[expert, : len(found)] = found
        return cls(slots_LP, where_LER, counts_LE)

    def gpu_loads(self, load_LE: np.ndarray, gpus: int) -> np.ndarray:
        """What each GPU carries, ``[L, gpus]``, when the replicas of an expert share its load evenly."""
        share_LE = np.asarray(load_LE, dtype=np.float64) / self.counts_LE
        share_LP = np.take_along_axis(share_LE, self.physical_to_logical_LP, axis=1)
        return share_LP.reshape(len(share_LP), gpus, -1).sum(axis=-1)


def imbalance(load_LG: np.ndarray) -> np.ndarray:
    """The busiest GPU's load over the mean, a layer: 1 is even; without any load 1 too."""
    mean_L = load_LG.mean(axis=-1)
    return np.where(mean_L > 0, load_LG.max(axis=-1) / np.where(mean_L > 0, mean_L, 1), 1.0)


def place(load_LE: np.ndarray, slots: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Place ``E`` experts, in ``groups`` groups, in ``slots`` slots of ``gpus`` GPUs of ``nodes`` nodes.

    Every expert gets a slot, every GPU equally many. Raises :class:`UserError` naming what does not divide.
    """
    load_LE = np.asarray(load_LE, dtype=np.float64)
    if load_LE.ndim != 2 or not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise UserError(f"load {load_LE.shape} must be [layers, experts], finite and not negative")
    experts = load_LE.shape[1]
    for name, value in (("groups", groups), ("nodes", nodes), ("gpus", gpus)):
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    if slots < experts:
        raise UserError(f"slots ({slots}) must hold every expert: at least {experts}")
    for name, whole, part, divisor in (
        ("slots", slots, "gpus", gpus),
        ("gpus", gpus, "nodes", nodes),
        ("experts", experts, "groups", groups),
    ):
        if whole % divisor:
            raise UserError(f"{part} ({divisor}) must divide {name} ({whole})")
    if groups % nodes:
        groups = nodes = 1
    found = [_place_layer(load_E.tolist(), slots, groups, nodes, gpus) for load_E in load_LE]
    return Placement.of(np.array(found), experts)


def _place_layer(load_E: list[float], slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    size = len(load_E) // groups
    group_loads = [sum(load_E[first : first + size]) for first in range(0, len(load_E), size)]
    found: list[int] = []
    for members in pack(group_loads, nodes):
        experts = [group * size + number for group in members for number in range(size)]
        replicas, shares = replicate([load_E[expert] for expert in experts], slots // nodes)
        for gpu in pack(shares, gpus // nodes):
            found += [experts[replicas[number]] for number in gpu]
    return found


def replicate(loads: Sequence[float], slots: int) -> tuple[list[int], list[float]]:
    """Whose replica each slot is, and its share of the load: first one for each, then for the busiest.

    No other choice of counts makes the busiest replica's share smaller.
    """
    owners = list(range(len(loads)))
    counts = [1] * len(loads)
    for _ in range(slots - len(loads)):
        busiest = max(range(len(loads)), key=lambda number: loads[number] / counts[number])
        owners.append(busiest)
        counts[busiest] += 1
    return owners, [loads[owner] / counts[owner] for owner in owners]


def pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Items into packs of equally many: the heaviest first, each into the lightest pack with room."""
    room = len(weights) // packs
    if room == 1:
        return [[number] for number in range(len(weights))]
    members: list[list[int]] = [[] for _ in range(packs)]
    totals = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        lightest = min((p for p in range(packs) if len(members[p]) < room), key=totals.__getitem__)
        members[lightest].append(item)
        totals[lightest] += weights[item]
    return members
