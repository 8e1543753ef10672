"""Progress as plain lines: what they say, how often, after a resume."""

from __future__ import annotations

import pytest

from dsv3.common import progress
from dsv3.common.progress import Progress, duration, human


def test_human() -> None:
    assert [human(x) for x in (0, 999, 999.6, 12345.6, 1e6, 1.5e9, 2e12, 3e15)] == [
        "0", "999", "1K", "12.3K", "1M", "1.5G", "2T", "3P",
    ]  # fmt: skip
    assert human(-12345) == "-12.3K"


def test_duration() -> None:
    assert [duration(x) for x in (0, 59.6, 125, 3723)] == ["0:00", "1:00", "2:05", "1:02:03"]


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_lines_come_every_ten_seconds_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train", 100, "tok") as bar:
        for _ in range(100):
            clock.now += 0.25
            bar.note("loss 3.2")
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("train: 40% 40/100 tok, 4 tok/s, 0:15 left") and "loss 3.2" in lines[0]
    assert lines[-1].startswith("train: 100%") and "left" not in lines[-1]


def test_a_resumed_job_counts_the_rate_from_where_it_started(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train", 1000, "tok", done=900) as bar:
        clock.now += 20
        bar.advance(40)
        assert "94% 940/1K tok, 2 tok/s, 0:30 left" in capsys.readouterr().err


def test_an_estimated_total_can_change(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 100, "steps") as bar:
        clock.now += 20
        bar.expect(80)
        bar.advance(40)
        assert "50% 40/80 steps, 2 steps/s, 0:20 left" in capsys.readouterr().err


def test_line_and_failure(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), Progress("train", 10) as bar:
        bar.line("checkpoint written")
        raise RuntimeError
    assert capsys.readouterr().err == "checkpoint written\n"  # no last line that looks like success


def test_unknown_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("read", 0, "B") as bar:
        clock.now += 1
        bar.advance(5)
    assert "5/0 B" in capsys.readouterr().err
