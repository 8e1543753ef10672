"""Ranks killed inside collectives, and for good: they are named, and the loss curve stays the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dsv3.checkpoint.run import verify
from tests.parallel.ranks import free_port
from tests.parallel.test_faults import data, last_step, recipe, same_losses, unbroken, wait_until, workers

__all__ = ["data", "unbroken"]  # fixtures


def torchrun(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "parallel", "said"),
    [
        ("rows", {"expert": 2}, ", while rows travelled"),
        ("gradients", {}, ", in the sum of gradients"),
        ("weights", {"expert": 2}, ", in the gathering of weights"),
        ("stream", {"pipeline": 2, "schedule": "1f1b"}, ", between the stages of the pipeline"),
    ],
)
def test_a_rank_dies_inside_a_collective(
    where: str, parallel: dict[str, Any], said: str, data: Path, unbroken: Path, tmp_path: Path
) -> None:
    out, path = tmp_path / "run", tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, out, **parallel)))
    launcher = torchrun(
        *("--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port())),
        *("-m", "tests.parallel.kills", where, "pretrain", str(path), "--resume", "auto"),
    )
    text = launcher.communicate(timeout=250)[0]
    assert launcher.returncode == 0, text
    assert f"rank 1 does not answer after step 4{said} (seen from rank 0" in text
    assert "resumed from step-00000" in (out / "log.txt").read_text()
    same_losses(out, unbroken)
    for folder in (out / "checkpoints").glob("step-*"):
        verify(folder)


@pytest.mark.slow
def test_half_the_ranks_are_gone_for_good(data: Path, unbroken: Path, tmp_path: Path) -> None:
    """Two launchers of two ranks each; one and its ranks are killed: the other goes on alone.

    The same batch a step, the same losses.
    """
    out, path = tmp_path / "run", tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, out, expert=2)))
    words = (
        *("--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "elastic"),
        *("--rdzv-conf", "last_call_timeout=10,join_timeout=120"),
        *("-m", "dsv3", "pretrain", str(path), "--resume", "auto"),
    )
    launchers = [torchrun(*words)]
    time.sleep(2)  # the first one's store is what they meet at
    launchers.append(torchrun(*words))
    try:
        saved = out / "checkpoints"
        wait_until(lambda: last_step(out) >= 3 and any(saved.glob("step-*")), launchers[0])
        lost = workers(launchers[1])
        assert len(lost) == len(workers(launchers[0])) == 2
        os.kill(launchers[1].pid, signal.SIGKILL)
        for process in lost:
            process.send_signal(signal.SIGKILL)
        text = launchers[0].communicate(timeout=250)[0]
    finally:
        for launcher in launchers:
            for process in psutil.Process(launcher.pid).children() if launcher.poll() is None else ():
                process.kill()
            launcher.kill()
            launcher.wait()
    assert launchers[0].returncode == 0, text
    assert "resumed from step-" in (out / "log.txt").read_text()
    same_losses(out, unbroken)
    assert len(list((out / "model").glob("*.safetensors"))) == 2  # a file a rank
