"""Trackers get the numbers, a missing one is refused with the way out; known devices have a peak."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from dsv3.common.errors import UserError
from dsv3.train.callbacks.metrics import device_peak, memory_bytes, open_tracker
from dsv3.train.run import RunFolder


def test_no_tracker(tmp_path: Path) -> None:
    assert open_tracker("none", RunFolder(tmp_path)) is None


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_numbers_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[tuple] = []
    library = types.ModuleType(name)
    library.init = lambda **options: calls.append(("init", options))  # type: ignore[attr-defined]
    library.log = lambda numbers, step: calls.append(("log", numbers, step))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, library)
    send = open_tracker(name, RunFolder(tmp_path / "myrun"))
    assert send is not None
    send({"loss": 1.5}, 7)
    assert calls == [("init", {"project": "dsv3", "name": "myrun"}), ("log", {"loss": 1.5}, 7)]


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    send = open_tracker("tensorboard", RunFolder(tmp_path))
    assert send is not None
    send({"loss": 1.5}, 7)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_missing_tracker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log.report_to \(wandb\) is not installed: pip install"):
        open_tracker("wandb", RunFolder(tmp_path))


def test_device_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_peak(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_peak(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T1000")
    assert device_peak(torch.device("cuda")) is None
    assert memory_bytes(torch.device("cpu")) > 10 * 2**20
