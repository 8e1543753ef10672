"""A pipeline schedule played through: who works when, who waits, what is held (report 3.2.1).

Times are in any one unit and belong to one micro-batch on one rank: a schedule that cuts a rank's layers into
v stages divides them by v, so that schedules on as many ranks do equal work. B is the whole backward and
holds W, the part for the weights; the part for the inputs is I = B - W. F&B is a forward and a backward
overlapped (``overlapped``; without overlap F + B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3.common.errors import UserError
from dsv3.plan.schedules import Action, Job, Schedule


@dataclass(frozen=True)
class Times:
    """Durations of one micro-batch on one rank. ``communication`` between ranks delays and occupies none."""

    forward: float = 1.0
    backward: float = 2.0
    weight: float = 1.0
    overlapped: float | None = None
    communication: float = 0.0

    def __post_init__(self) -> None:
        for field in ("forward", "backward", "weight"):
            if not 0 < getattr(self, field) < math.inf:
                raise UserError(f"{field} ({getattr(self, field):g}) must be more than 0, and finite")
        if self.weight >= self.backward:
            raise UserError(
                f"weight ({self.weight:g}) must be less than backward ({self.backward:g}), which holds it"
            )
        if not 0 <= self.communication < math.inf:
            raise UserError(f"communication ({self.communication:g}) must not be negative, and finite")
        least = max(self.forward, self.backward)
        if self.overlapped is not None and not least <= self.overlapped <= self.forward + self.backward:
            raise UserError(
                f"overlapped ({self.overlapped:g}) must lie between the longer of forward and backward "
                f"({least:g}) and their sum ({self.forward + self.backward:g})"
            )

    @property
    def together(self) -> float:
        """F&B."""
        return self.forward + self.backward if self.overlapped is None else self.overlapped

    def of(self, action: Action) -> float:
        """An action's duration where a rank has one stage."""
        if len(action) == 2:
            return self.together
        return {
            "F": self.forward, "B": self.backward, "I": self.backward - self.weight, "W": self.weight,
        }[action[0].kind]  # fmt: skip


@dataclass(frozen=True)
class Span:
    """An action as it ran on a rank."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule as it ran. ``activations``: each rank's peak, in micro-batches through 1/P of the model."""

    schedule: Schedule
    times: Times
    spans: tuple[tuple[Span, ...], ...]
    activations: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time each rank works."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Time each rank waits."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Of the rank that waits longest, which is what the formulas give.

        Ranks differ in DualPipe alone, with F&B below F + B: they overlap unequal numbers of pairs.
        """
        return max(self.bubbles)


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """Run every rank's order, each action as soon as its rank is free and what it needs has arrived.

    Raises :class:`ValueError` for an order that waits for itself.
    """
    needs = _needs(schedule)
    done: dict[Job, tuple[float, int]] = {}  # when, and on which rank
    spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            mine = spans[rank]
            while len(mine) < len(order):
                action = order[len(mine)]
                wanted = [need for job in action for need in needs[job]]
                if not all(need in done for need in wanted):
                    break
                start = mine[-1].end if mine else 0.0
                for need in wanted:
                    at, where = done[need]
                    start = max(start, at + (times.communication if where != rank else 0.0))
                end = start + times.of(action) / schedule.stages_per_rank
                mine.append(Span(action, start, end))
                for job in action:
                    for part in _parts(job):
                        done[part] = end, rank
                moved = True
    for rank, order in enumerate(schedule.orders):
        if len(spans[rank]) < len(order):
            stuck = order[len(spans[rank])]
            raise ValueError(f"rank {rank} waits for ever before {stuck}")
    held = tuple(_held(mine, schedule.stages_per_rank) for mine in spans)
    return Timeline(schedule, times, tuple(map(tuple, spans)), held)


def _parts(job: Job) -> tuple[Job, ...]:
    """What a job gets done: B is both of its parts."""
    if job.kind != "B":
        return (job,)
    return job._replace(kind="I"), job._replace(kind="W")


def _needs(schedule: Schedule) -> dict[Job, list[Job]]:
    """What must be done before a job may start."""
    last = schedule.stages - 1
    needs: dict[Job, list[Job]] = {}
    for order in schedule.orders:
        for action in order:
            for job in action:
                stage, kind, m = job
                if kind == "F":
                    needs[job] = [Job(stage - 1, "F", m)] if stage else []
                elif kind == "W":
                    needs[job] = [Job(stage, "I", m)]
                else:
                    needs[job] = [Job(stage, "F", m)]
                    if stage < last:
                        needs[job].append(Job(stage + 1, "I", m))
    return needs


def _held(spans: list[Span], stages_per_rank: int) -> float:
    """Peak of activations held: from a forward's start to the end of the backward, W included."""
    held = peak = 0
    for span in spans:
        kinds = [job.kind for job in span.action]
        held += "F" in kinds
        peak = max(peak, held)
        held -= "B" in kinds or "W" in kinds
    return peak / stages_per_rank


def formula(schedule: Schedule, times: Times) -> tuple[str, float] | None:
    """The bubble's formula, in words and evaluated; None for zbv, which has none in the report.

    Report 3.2.1, table 2, with P ranks. DualPipeV is DualPipe's formula for PP = 2 P stages of half the size.
    They hold without communication: 1F1B's always, ZB1P's for W <= min(F, I), DualPipe's for W <= F = I.
    With I > F DualPipe's order waits less than the formula says, by (P/2 - 1)(I - F), at most by F; with
    I < F it waits longer.
    """
    ranks, per_rank = schedule.ranks, schedule.stages_per_rank
    f, b, w = times.forward, times.backward, times.weight
    if schedule.name == "1f1b":
        return "(P - 1)(F + B)", (ranks - 1) * (f + b)
    if schedule.name == "interleaved":
        return "(P - 1)(F + B) / v", (ranks - 1) * (f + b) / per_rank
    if schedule.name == "zb1p":
        return "(P - 1)(F + B - 2W)", (ranks - 1) * (f + b - 2 * w)
    if schedule.name == "dualpipe":
        return "(P/2 - 1)(F&B + B - 3W)", (ranks / 2 - 1) * (times.together + b - 3 * w)
    if schedule.name == "dualpipev":
        return "(P - 1)(F&B + B - 3W) / 2", (ranks - 1) * (times.together + b - 3 * w) / 2
    return None


def summary(timeline: Timeline) -> dict[str, object]:
    """Plain data; times in the unit they were given in."""
    known = formula(timeline.schedule, timeline.times)
    return {
        "schedule": timeline.schedule.name,
        "ranks": timeline.schedule.ranks,
        "micro_batches": timeline.schedule.micro_batches,
        "stages_per_rank": timeline.schedule.stages_per_rank,
        "time_total": timeline.makespan,
        "time_bubble": timeline.bubble,
        "time_bubble_formula": known[1] if known else None,
        "bubble_formula": known[0] if known else None,
        "bubble_share": timeline.bubble / timeline.makespan,
        "time_busy_by_rank": list(timeline.busy),
        "time_bubble_by_rank": list(timeline.bubbles),
        "peak_activations_by_rank_micro_batches": list(timeline.activations),
    }
