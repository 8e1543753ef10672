"""Schedules: against torch's own orders and the report's formulas, and what no schedule may break."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from dsv3.common.errors import UserError
from dsv3.plan.pipeline import Timeline, Times, formula, simulate, summary
from dsv3.plan.schedules import SCHEDULES, Job, Schedule, schedule, text


@st.composite
def any_schedule(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(SCHEDULES))
    ranks = draw(st.integers(1, 6))
    micro_batches = draw(st.integers(1, 14))
    if name == "interleaved":
        micro_batches = ranks * draw(st.integers(1, 3))
    elif name.startswith("dualpipe"):
        micro_batches += 2 * ranks
        if name == "dualpipe":
            micro_batches, ranks = 2 * micro_batches, 2 * ranks
    return schedule(name, ranks, micro_batches, draw(st.integers(1, 3)))


some_times = st.builds(
    lambda f, i, w, overlap, c: Times(f, i + w, w, max(f, i + w, overlap * (f + i + w)), c),
    *(st.floats(0.25, 4) for _ in range(3)), st.floats(0.5, 1), st.sampled_from([0.0, 0.3]),
)  # fmt: skip


def parts(job: Job) -> list[Job]:
    return [job._replace(kind="I"), job._replace(kind="W")] if job.kind == "B" else [job]


@given(any_schedule())
@settings(max_examples=60, deadline=None)
def test_every_piece_of_work_is_done_once(made: Schedule) -> None:
    done = Counter(part for order in made.orders for action in order for job in action for part in parts(job))
    assert done == Counter(
        Job(s, kind, m) for s in range(made.stages) for kind in "FIW" for m in range(made.micro_batches)
    )


@given(any_schedule(), some_times)
@settings(max_examples=60, deadline=None)
def test_no_rank_does_two_things_at_once_and_nothing_comes_before_its_cause(
    made: Schedule, times: Times
) -> None:
    ran = simulate(made, times)
    started: dict[Job, tuple[float, int]] = {}
    ended: dict[Job, tuple[float, int]] = {}
    for rank, spans in enumerate(ran.spans):
        assert [span.action for span in spans] == list(made.orders[rank])
        assert all(before.end <= after.start for before, after in pairwise(spans))
        for span in spans:
            assert span.end - span.start == pytest.approx(times.of(span.action) / made.stages_per_rank)
            for job in span.action:
                for part in parts(job):
                    started[part], ended[part] = (span.start, rank), (span.end, rank)

    def after(job: Job, cause: Job) -> None:
        (start, here), (end, there) = started[job], ended[cause]
        assert start >= end + (times.communication if here != there else 0)

    for job in started:
        stage, kind, m = job
        if kind == "F" and stage:
            after(job, Job(stage - 1, "F", m))
        if kind == "I":
            after(job, Job(stage, "F", m))
            if stage + 1 < made.stages:
                after(job, Job(stage + 1, "I", m))
        whole = started[job] == started[job._replace(kind="I")]
        if kind == "W" and not whole:
            after(job, Job(stage, "I", m))


@given(any_schedule(), some_times)
@settings(max_examples=60, deadline=None)
def test_lower_bounds(made: Schedule, times: Times) -> None:
    """No schedule is shorter than its busiest rank, nor than one micro-batch there and back."""
    ran = simulate(made, times)
    through = made.ranks * (times.forward + times.backward - times.weight)
    hops = 2 * (made.ranks - 1) * times.communication
    assert ran.makespan >= max(ran.busy) - 1e-9
    assert ran.makespan >= through + hops - 1e-9
    work = made.micro_batches * (times.forward + times.backward)
    least = made.micro_batches * times.together
    assert all(min(work, least) - 1e-9 <= busy <= work + 1e-9 for busy in ran.busy)
    assert min(ran.bubbles) >= -1e-9


def play(name: str, ranks: int, micro_batches: int, times: Times, v: int = 2) -> Timeline:
    return simulate(schedule(name, ranks, micro_batches, v), times)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"])
def test_bubble_is_the_reports_formula(name: str) -> None:
    """Report 3.2.1, table 2, over a grid of ranks, micro-batches and times."""
    checked = 0
    for ranks in (2, 4, 8):
        for micro_batches in (2 * ranks, 4 * ranks):
            for forward in (1.0, 1.7):
                for weight in (0.4, 1.0):
                    for overlap in (1.0, 0.8):
                        backward = forward + weight  # I = F: what DualPipe's formula takes for granted
                        together = max(backward, overlap * (forward + backward))
                        times = Times(forward, backward, weight, together)
                        ran = play(name, ranks, micro_batches, times, v=3)
                        known = formula(ran.schedule, times)
                        assert known is not None
                        assert ran.bubble == pytest.approx(known[1], abs=1e-9), (ranks, micro_batches, times)
                        checked += 1
    assert checked == 48


def test_where_the_formulas_end() -> None:
    """1F1B's always holds; ZB1P's to W = min(F, I); DualPipe's order beats its own for I > F."""
    uneven = Times(1.0, 2.0, 0.5)  # I = 1.5
    for name, ranks, micro_batches, gain in (
        ("1f1b", 4, 9, 0.0), ("interleaved", 4, 8, 0.0), ("zb1p", 4, 9, 0.0),
        ("dualpipe", 4, 12, 0.5), ("dualpipe", 16, 40, 1.0),
    ):  # fmt: skip
        ran = play(name, ranks, micro_batches, uneven)
        known = formula(ran.schedule, uneven)
        assert known is not None and known[1] - ran.bubble == pytest.approx(gain)
    heavy = Times(1.0, 2.2, 1.2)
    ran = play("zb1p", 4, 9, heavy)
    known = formula(ran.schedule, heavy)
    assert known is not None and ran.bubble - known[1] == pytest.approx(3 * 0.2)
    assert formula(play("zbv", 4, 8, heavy).schedule, heavy) is None


def test_activations_held() -> None:
    """Report 3.2.1, table 2: PP for 1F1B and ZB1P, PP + 1 for DualPipe; ZBV no more than 1F1B."""
    times = Times()
    assert play("1f1b", 8, 20, times).activations == (8, 7, 6, 5, 4, 3, 2, 1)
    assert play("zb1p", 8, 20, times).activations == (8,) * 8
    assert play("dualpipe", 8, 20, times).activations == (9,) * 8
    assert play("dualpipev", 4, 10, times).activations == (4.5,) * 4  # 9 halves of a rank's layers
    assert play("zbv", 8, 20, times).activations == (8,) * 8
    assert play("1f1b", 8, 3, times).activations == (3, 3, 3, 3, 3, 3, 2, 1)


def torchs(kind: str, ranks: int, micro_batches: int) -> list[list[str]]:
    """Orders of torch.distributed.pipelining, made without processes or models."""
    made = object.__new__(getattr(torch_schedules, kind))
    made.pp_group_size, made._n_microbatches = ranks, micro_batches
    made.num_stages = made._num_stages = 2 * ranks
    if kind == "ScheduleInterleaved1F1B":
        made.n_local_stages, made.microbatches_per_round = 2, ranks
    orders = [made._calculate_single_rank_operations(rank) for rank in range(ranks)]
    return [[str(action) for action in order if action is not None] for order in orders]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("interleaved", "ScheduleInterleaved1F1B"),
        ("zbv", "ScheduleZBVZeroBubble"),
        ("dualpipev", "ScheduleDualPipeV"),
    ],
)
def test_orders_are_torchs(name: str, kind: str) -> None:
    for ranks in (1, 2, 3, 4, 8):
        for micro_batches in (2 * ranks, 3 * ranks):
            ours = [
                [text(action) for action in order] for order in schedule(name, ranks, micro_batches).orders
            ]
            assert ours == torchs(kind, ranks, micro_batches), (ranks, micro_batches)


def test_text_is_read_by_torch() -> None:
    for name in SCHEDULES:
        for order in schedule(name, 4, 8).orders:
            for action in order:
                read = torch_schedules._Action.from_str(text(action))
                jobs = read.sub_actions or (read,)
                found = [Job(j.stage_index, j.computation_type.value, j.microbatch_index) for j in jobs]
                assert found == list(action)


def test_dualpipe_is_dualpipev_unfolded() -> None:
    """Both halves of the ranks mirror each other, and either half is the V on half as many ranks."""
    wide, folded = schedule("dualpipe", 8, 20), schedule("dualpipev", 4, 10)
    for rank in range(4):
        mirrored = tuple(
            tuple(job._replace(micro_batch=(job.micro_batch + 10) % 20) for job in action)
            for action in wide.orders[rank]
        )
        assert mirrored == wide.orders[7 - rank]
        flat = [[(job.kind, job.micro_batch % 10) for job in action] for action in wide.orders[rank]]
        assert flat == [[(job.kind, job.micro_batch) for job in action] for action in folded.orders[rank]]


def test_an_order_that_waits_for_itself_is_refused() -> None:
    made = schedule("1f1b", 2, 2)
    turned = Schedule("1f1b", 2, 2, 2, 1, (tuple(reversed(made.orders[0])), made.orders[1]))
    with pytest.raises(ValueError, match="rank 0 waits for ever"):
        simulate(turned, Times())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("1f2b", 4, 8), "did you mean 1f1b"),
        (("1f1b", 0, 8), r"ranks \(0\)"),
        (("interleaved", 4, 10), "try 12"),
        (("dualpipe", 5, 20), r"ranks \(5\) must be even"),
        (("dualpipe", 4, 9), r"micro_batches \(9\) must be even"),
        (("dualpipev", 4, 7), "use 8 or more"),
    ],
)
def test_impossible_schedules_are_refused(arguments: tuple[str, int, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        schedule(*arguments)


@pytest.mark.parametrize(
    "times, said",
    [
        (dict(forward=0), r"forward \(0\)"),
        (dict(weight=2), r"weight \(2\) must be less than backward \(2\)"),
        (dict(communication=-1), "negative"),
        (dict(overlapped=1.5), r"overlapped \(1.5\)"),
        (dict(overlapped=3.5), r"overlapped \(3.5\)"),
    ],
)
def test_impossible_times_are_refused(times: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Times(**times)


def test_summary_and_picture(tmp_path: Path) -> None:
    from PIL import Image

    from dsv3.plan.draw import draw

    ran = [play("dualpipe", 2, 4, Times(1, 2, 1, 2.5)), play("zb1p", 2, 4, Times())]
    found = summary(ran[1])
    assert found["time_total"] == 4 * 3 + 1 and found["time_bubble"] == found["time_bubble_formula"] == 1
    assert found["bubble_share"] == pytest.approx(1 / 13)
    draw(ran, tmp_path / "schedules.png", "ms")
    with Image.open(tmp_path / "schedules.png") as image:
        assert image.width > 1500 and len(image.convert("RGB").getcolors(1 << 24)) > 50
