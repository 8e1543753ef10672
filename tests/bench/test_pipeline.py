"""Traces of pipelines: what was measured comes out as times, as a timeline and as Perfetto's events."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv3.bench.pipeline import chrome_trace, fastest
from dsv3.cli import bench as verbs
from dsv3.common.errors import UserError
from dsv3.plan.pipeline import Timeline, Times, simulate
from dsv3.plan.schedules import schedule


def as_ran(timeline: Timeline, shift: float, slower: float) -> list[list]:
    """A timeline as ranks report it: seconds of some clock, ``slower`` times as long."""
    return [
        [
            [
                [list(job) for job in span.action],
                *(shift + slower * at / 1e3 for at in (span.start, span.end)),
            ]
            for span in spans
        ]
        for spans in timeline.spans
    ]


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_a_simulated_run_is_read_back(name: str) -> None:
    """The fastest of three steps is found and gives the times it was made of."""
    times = Times(10.0, 21.0, 9.0, 28.0)
    ran = simulate(schedule(name, 2, 8), times)
    steps = [as_ran(ran, shift, slower) for shift, slower in ((5.0, 2.0), (70.0, 1.0), (90.0, 1.5))]
    found = fastest(ran.schedule, [list(rank) for rank in zip(*steps)])
    assert found.makespan == pytest.approx(ran.makespan)
    assert found.bubble == pytest.approx(ran.bubble)
    assert [[s.action for s in spans] for spans in found.spans] == [[s.action for s in x] for x in ran.spans]
    assert found.times.forward == pytest.approx(10.0)
    assert found.times.backward == pytest.approx(21.0)
    if name in ("zbv", "dualpipev"):
        assert found.times.weight == pytest.approx(9.0)
    if name == "dualpipev":
        assert found.times.together == pytest.approx(28.0)


def test_events_for_perfetto() -> None:
    ran = simulate(schedule("dualpipev", 2, 4), Times())
    events = chrome_trace(ran)["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"pipeline rank 0", "pipeline rank 1"}
    blocks = [event for event in events if event["ph"] == "X"]
    assert len(blocks) == sum(map(len, ran.spans))
    for rank in range(2):
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in blocks if e["pid"] == rank)
        assert all(before[1] <= after[0] for before, after in pairwise(mine))
    pair = next(event for event in blocks if event["cat"] == "F&B")
    assert pair["name"].count("&") == 1 and len(pair["args"]["stages"]) == 2


def test_an_unknown_schedule_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = CliRunner().invoke(verbs.app, ["pipeline", "--schedule", "1f1b,dualpipe", "--out", str(out)])
    assert isinstance(found.exception, UserError) and "schedule (dualpipe) is unknown" in str(found.exception)
    found = CliRunner().invoke(verbs.app, ["pipeline", "--micro-batches", "3", "--out", str(out)])
    assert isinstance(found.exception, UserError) and "at least twice ranks (2)" in str(found.exception)
    assert not out.exists()


@pytest.mark.slow
def test_a_real_run_is_traced_and_drawn(tmp_path: Path) -> None:
    given = ["pipeline", "--schedule", "zbv", "--steps", "1", "--out", str(tmp_path), "--json"]
    found = CliRunner().invoke(verbs.app, given)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["ratios"]["simulation:zbv"] > 0.8
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "trace-zbv.json").read_text())["traceEvents"]
