"""Seconds of GPU work, contestants in turns: what is timed is a replayed graph, without Python's share."""

from __future__ import annotations

from collections.abc import Callable

import torch

Calls = list[Callable[[], object]]
# Contestants by name, each with calls on operands of their own; rounds. To seconds a call of every round.
Timer = Callable[[dict[str, Calls], int], dict[str, list[float]]]

CALLS = 8  # at least, in a graph: its own start is then of no weight


def captured(calls: Calls) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls, each made once before, and their number."""
    repeated = calls * -(-CALLS // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()
    return graph, len(repeated)


def graphs_in_turns(contestants: dict[str, Calls], rounds: int) -> dict[str, list[float]]:
    """A :data:`Timer` by CUDA events around graphs; the first round does not count."""
    graphs = {name: captured(calls) for name, calls in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, (graph, calls) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                seconds[name].append(start.elapsed_time(end) / 1e3 / calls)
    return seconds


def calls_in_turns(contestants: dict[str, Calls], rounds: int) -> dict[str, list[float]]:
    """A :data:`Timer` for work that a graph cannot hold, since it asks the GPU for sizes; Python included."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, calls in contestants.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
            if turn > 1:
                seconds[name].append(start.elapsed_time(end) / 1e3 / len(calls))
    return seconds
