"""``dsv3 bench pipeline``: a real pipeline's trace beside the simulation of ``plan/pipeline``.

The ranks are processes of this machine with one thread each. The simulation is given the mean durations that
the trace shows, so that what differs is waiting: sending, receiving, and whatever else the machine does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from dsv3.bench.machine import machine
from dsv3.bench.ranks import run_ranks
from dsv3.common.files import write_atomic
from dsv3.common.progress import Progress
from dsv3.plan.draw import draw
from dsv3.plan.pipeline import Span, Timeline, Times, simulate
from dsv3.plan.schedules import Job, Schedule, schedule

MODEL = {"num_hidden_layers": 14, "vocab_size": 2048}
SEQUENCES, LENGTH = 2, 256


def bench(names: list[str], ranks: int, micro_batches: int, steps: int, out: Path) -> dict[str, Any]:
    """Run each schedule; write ``trace-NAME.json`` and ``pipeline.png`` below ``out``."""
    orders = {name: schedule(name, ranks, micro_batches) for name in names}  # wrong numbers: refused here
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Timeline] = []
    ours: dict[str, Any] = {}
    with Progress("bench pipeline", len(names), "schedules") as progress:
        for name, order in orders.items():
            job = {
                "schedule": name, "ranks": ranks, "micro_batches": micro_batches, "steps": steps,
                "model": MODEL, "sequences": SEQUENCES, "length": LENGTH,
            }  # fmt: skip
            ran = run_ranks("dsv3.bench.pipeline_worker", job, ranks, f"schedule {name}")
            measured = fastest(order, ran)
            simulated = simulate(order, measured.times)
            trace = out / f"trace-{name}.json"
            write_atomic(trace, json.dumps(chrome_trace(measured)).encode())
            drawn += [replace(measured, schedule=replace(order, name=f"{name}, measured")), simulated]
            ours[name] = {
                "step_ms": measured.makespan,
                "simulated_ms": simulated.makespan,
                "bubble_share": measured.bubble / measured.makespan,
                "simulated_bubble_share": simulated.bubble / simulated.makespan,
                "times_ms": vars(measured.times),
                "trace": str(trace),
            }
            progress.advance(1)
    picture = out / "pipeline.png"
    draw(drawn, picture, "ms")
    ratios = {f"simulation:{name}": row["step_ms"] / row["simulated_ms"] for name, row in ours.items()}
    return {
        "ratios": ratios,
        "ours": ours,
        "peers": {},
        "machine": machine(),
        "ranks": ranks,
        "micro_batches": micro_batches,
        "picture": str(picture),
    }


def fastest(order: Schedule, ran: list[list[list[Any]]]) -> Timeline:
    """The step that took the least time, in milliseconds from its first job; neighbours spoil the others."""
    found = []
    for step in zip(*ran):
        start = min(rank[0][1] for rank in step)
        spans = tuple(
            tuple(
                Span(tuple(Job(*job) for job in jobs), 1e3 * (first - start), 1e3 * (last - start))
                for jobs, first, last in rank
            )
            for rank in step
        )
        times = mean_times(order, spans)
        found.append(Timeline(order, times, spans, simulate(order, times).activations))
    return min(found, key=lambda timeline: timeline.makespan)


def mean_times(order: Schedule, spans: tuple[tuple[Span, ...], ...]) -> Times:
    """Mean durations as :class:`Times` counts them: of a micro-batch through all of a rank's stages."""
    lasted: dict[str, list[float]] = {}
    for rank in spans:
        for span in rank:
            kind = "&".join(job.kind for job in span.action)
            lasted.setdefault(kind, []).append(order.stages_per_rank * (span.end - span.start))
    forward = mean(lasted["F"])
    split = mean(lasted["I"]) + mean(lasted["W"]) if "W" in lasted else 0.0
    backward = mean(lasted["B"]) if "B" in lasted else split
    weight = mean(lasted["W"]) if "W" in lasted else backward / 2  # without W of its own nothing asks for it
    overlapped = None
    if "F&B" in lasted:
        overlapped = min(max(mean(lasted["F&B"]), forward, backward), forward + backward)
    return Times(forward, backward, min(weight, 0.99 * backward), overlapped)


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace as chrome://tracing and Perfetto read it: a process a rank, microseconds."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for rank in range(timeline.schedule.ranks)
    ]
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            events.append(
                {
                    "ph": "X", "pid": rank, "tid": 0, "ts": 1e3 * span.start,
                    "dur": 1e3 * (span.end - span.start), "name": " & ".join(map(str, span.action)),
                    "cat": "&".join(job.kind for job in span.action),
                    "args": {
                        "stages": [job.stage for job in span.action],
                        "micro_batches": [job.micro_batch for job in span.action],
                    },
                }
            )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def report(result: dict[str, Any]) -> str:
    """For people."""
    cores = result["machine"]["cores"]
    lines = [f"{result['ranks']} ranks, {result['micro_batches']} micro-batches, {cores} cores"]
    for name, row in result["ours"].items():
        lines.append(
            f"{name}: step {row['step_ms']:.0f} ms, simulated from its own jobs' times "
            f"{row['simulated_ms']:.0f} ms; bubble {row['bubble_share']:.1%}, simulated "
            f"{row['simulated_bubble_share']:.1%}; {row['trace']} opens in Perfetto"
        )
    return "\n".join([*lines, f"picture: {result['picture']}"])
