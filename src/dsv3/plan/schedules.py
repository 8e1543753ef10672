"""In which order each pipeline rank works (report 3.2.1): pure lists, for the simulator and an executor.

P ranks, M micro-batches, S stages. A job is the forward F, the full backward B, its input part I or its
weight part W (B = I and W in one) of one micro-batch in one stage. A rank's order is a list of actions, and
an action is one job, or a forward and a backward that run together (the report's F&B). Written as text they
are the actions of ``torch.distributed.pipelining`` (``3F0``, ``(3F0;2B1)OVERLAP_F_B``).

1f1b        S = P, stage s on rank s.
interleaved S = v P, stage s on rank s mod P (Megatron-LM, arXiv 2104.04473).
zb1p        1F1B with W put off, the report's ZB1P (ZB-H1 of arXiv 2401.10241).
zbv         S = 2 P in a V: rank r has stages r and 2P - 1 - r (arXiv 2405.15362).
dualpipe    S = P, each stage on two ranks: the first half of the micro-batches runs from rank 0 to P - 1, the
            second half from P - 1 to 0.
dualpipev   the same order folded: S = 2 P in a V, one copy of the parameters.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dsv3.common.errors import UserError, nearest

SCHEDULES = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")


class Job(NamedTuple):
    """One piece of work: ``kind`` F, B, I or W of ``micro_batch`` in ``stage``."""

    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Action = tuple[Job, ...]  # one job, or (forward, backward) overlapped


def text(action: Action) -> str:
    """An action as ``torch.distributed.pipelining`` writes it."""
    if len(action) == 1:
        return str(action[0])
    return f"({';'.join(map(str, action))})OVERLAP_F_B"


@dataclass(frozen=True)
class Schedule:
    """The orders of all ranks. ``stages_per_rank``: passes of a micro-batch through one rank."""

    name: str
    ranks: int
    micro_batches: int
    stages: int
    stages_per_rank: int
    orders: tuple[tuple[Action, ...], ...]


def schedule(name: str, ranks: int, micro_batches: int, stages_per_rank: int = 2) -> Schedule:
    """The schedule ``name`` for ``ranks`` and ``micro_batches``; ``stages_per_rank`` is interleaved's v.

    Raises :class:`UserError` for an unknown name and for numbers the schedule cannot have.
    """
    if name not in SCHEDULES:
        raise UserError(
            f"schedule ({name}) is unknown{nearest(name, SCHEDULES)}; there are {', '.join(SCHEDULES)}"
        )
    for field, value in (
        ("ranks", ranks), ("micro_batches", micro_batches), ("stages_per_rank", stages_per_rank),
    ):  # fmt: skip
        if value < 1:
            raise UserError(f"{field} ({value}) must be at least 1")
    if name in ("1f1b", "zb1p"):
        orders = [list(_one_stage(rank, ranks, micro_batches, name == "zb1p")) for rank in range(ranks)]
        return _made(name, ranks, micro_batches, 1, orders)
    if name == "interleaved":
        if micro_batches % ranks:
            raise UserError(
                f"micro_batches ({micro_batches}) must be a multiple of ranks ({ranks}) for interleaved; "
                f"try {-(-micro_batches // ranks) * ranks}"
            )
        orders = [list(_interleaved(rank, ranks, micro_batches, stages_per_rank)) for rank in range(ranks)]
        return _made(name, ranks, micro_batches, stages_per_rank, orders)
    if name == "zbv":
        orders = [list(_zbv(rank, ranks, micro_batches)) for rank in range(ranks)]
        return _made(name, ranks, micro_batches, 2, orders)
    if micro_batches < 2 * ranks:
        raise UserError(
            f"micro_batches ({micro_batches}) must be at least twice ranks ({ranks}) for {name}; "
            f"use {2 * ranks} or more"
        )
    if name == "dualpipev":
        orders = [
            list(_placed(_two_ways(rank, ranks, micro_batches), (rank, 2 * ranks - 1 - rank), (0, 0)))
            for rank in range(ranks)
        ]
        return _made(name, ranks, micro_batches, 2, orders)
    for field, value in (("ranks", ranks), ("micro_batches", micro_batches)):
        if value % 2:
            raise UserError(f"{field} ({value}) must be even for dualpipe; try {value + 1}")
    orders = []
    for rank in range(ranks):
        # Seen from its nearer end, a rank's own direction comes first: the second half mirrors the first.
        nearer, half = min(rank, ranks - 1 - rank), micro_batches // 2
        stages = (nearer, ranks - 1 - nearer)
        firsts = (0, half) if rank == nearer else (half, 0)
        orders.append(list(_placed(_two_ways(nearer, ranks // 2, half), stages, firsts)))
    return _made(name, ranks, micro_batches, 1, orders)


def _made(name: str, ranks: int, micro_batches: int, per_rank: int, orders: list[list[Action]]) -> Schedule:
    stages = ranks * per_rank
    return Schedule(name, ranks, micro_batches, stages, per_rank, tuple(map(tuple, orders)))


def _one_stage(rank: int, ranks: int, micro_batches: int, split: bool) -> Iterator[Action]:
    """1F1B; with ``split`` ZB1P: W waits for ``rank`` steps, so that all ranks hold the same activations."""
    ahead = min(ranks - 1 - rank, micro_batches)
    for m in range(ahead):
        yield (Job(rank, "F", m),)
    for m in range(micro_batches):
        if m + ahead < micro_batches:
            yield (Job(rank, "F", m + ahead),)
        yield (Job(rank, "I" if split else "B", m),)
        if split and m >= rank:
            yield (Job(rank, "W", m - rank),)
    if split:
        for m in range(max(0, micro_batches - rank), micro_batches):
            yield (Job(rank, "W", m),)


def _interleaved(rank: int, ranks: int, micro_batches: int, v: int) -> Iterator[Action]:
    """P micro-batches through one of the rank's v stages, then the same P through the next."""
    total = v * micro_batches

    def forward(i: int) -> Job:
        turn, within = divmod(i, ranks * v)
        return Job(within // ranks * ranks + rank, "F", turn * ranks + within % ranks)

    def backward(i: int) -> Job:
        turn, within = divmod(i, ranks * v)
        return Job((v - 1 - within // ranks) * ranks + rank, "B", turn * ranks + within % ranks)

    ahead = min(total, (ranks - 1 - rank) * (2 if v > 1 else 1) + (v - 1) * ranks)
    for i in range(ahead):
        yield (forward(i),)
    for i in range(total):
        if i + ahead < total:
            yield (forward(i + ahead),)
        yield (backward(i),)


def _zbv(rank: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    """ZB-V. It is laid out for 2P - 1 micro-batches or more; of fewer, those that are not there fall out."""
    laid_out = max(2 * ranks - 1, micro_batches)
    down, up = rank, 2 * ranks - 1 - rank
    seen: Counter[tuple[int, str]] = Counter()

    def plan() -> Iterator[tuple[int, str]]:
        yield from [(down, "F")] * (2 * (ranks - rank) - 1)
        yield from [(up, "F"), (down, "F")] * rank
        yield from [(up, "F"), (up, "I"), (up, "W")] * (ranks - rank)
        while seen[up, "F"] < laid_out:
            if seen[down, "F"] < laid_out:
                yield down, "F"
            yield from [(down, "I"), (down, "W"), (up, "F"), (up, "I"), (up, "W")]
        yield from [(down, "I"), (up, "I")] * rank
        yield from [(down, "I"), (down, "W")] * (ranks - rank)
        yield from [(up, "W")] * (laid_out - seen[up, "W"])
        yield from [(down, "W")] * (laid_out - seen[down, "W"])

    for stage, kind in plan():
        m = seen[stage, kind]
        seen[stage, kind] += 1
        if m < micro_batches:
            yield (Job(stage, kind, m),)


def _two_ways(rank: int, ranks: int, count: int) -> Iterator[list[tuple[str, int]]]:
    """DualPipe's eight steps as ``[(kind, way)]``: way 0 the rank's own direction, 1 the one that returns.

    ``rank`` of ``ranks`` counts from the end where way 0 starts to the middle, where the ways meet (in the V:
    its bend); ``count`` micro-batches a way. After DeepSeek's DualPipe (github.com/deepseek-ai/DualPipe).
    """
    to_middle = ranks - 1 - rank
    yield from [[("F", 0)]] * (2 * to_middle)
    yield from [[("F", 0)], [("F", 1)]] * (rank + 1)
    yield from [[("I", 1)], [("W", 1)], [("F", 1)]] * to_middle
    for i in range(count - 2 * ranks + rank + 1):
        if i == 0 and to_middle == 0:  # apart: the partner in the middle gets its forward that much earlier
            yield from [[("F", 0)], [("B", 1)]]
        else:
            yield [("F", 0), ("B", 1)]
        yield [("F", 1), ("B", 0)]
    yield from [[("B", 1)], [("F", 1), ("B", 0)]] * to_middle
    # The last backwards are split from the middle of this step on: their W fill what follows.
    whole = rank + 1
    ends = ["B"] * whole + ["I"] * whole
    for i in range(whole):
        yield [(ends[2 * i], 1)]
        yield [(ends[2 * i + 1], 0)]
    put_off = deque([1, 0][i % 2] for i in range(whole, 2 * whole))
    for _ in range(to_middle):
        yield [("W", put_off.popleft())]
        yield [("I", 0)]
        put_off.append(0)
    yield from ([("W", way)] for way in put_off)


def _placed(
    steps: Iterator[list[tuple[str, int]]], stages: tuple[int, int], firsts: tuple[int, int]
) -> Iterator[Action]:
    """Steps of :func:`_two_ways` as actions: each way's stage, its micro-batches counted from its first."""
    seen: Counter[tuple[int, str]] = Counter()

    def job(kind: str, way: int) -> Job:
        counted = ("I", "W") if kind == "B" else (kind,)  # B is I and W in one
        m = firsts[way] + seen[way, counted[0]]
        for each in counted:
            seen[way, each] += 1
        return Job(stages[way], kind, m)

    for step in steps:
        yield tuple(job(kind, way) for kind, way in step)
