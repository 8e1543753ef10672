"""Training runs that differ in a few keys, each from several seeds, compared in pairs.

The same model from the same seed sees the same data in the same order in every variation. Every run is an
ordinary ``dsv3 pretrain`` in a folder of its own, so that the whole goes on where it was stopped. Two runs
that differ by rounding alone drift apart; several seeds tell such drift from an effect.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.common.errors import Failure, UserError
from dsv3.common.progress import Progress
from dsv3.train.run import read_lines

RECIPE = Path("recipes/pretrain-tiny.yaml")
SEQUENCES, LENGTH = 8, 128  # a step

# Student's t, 97.5 %, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Run:
    """A variation (its name and the words that make it) from a seed, in a folder of its own."""

    name: str
    seed: int
    folder: Path
    words: tuple[str, ...] = ()


def runs_of(variations: dict[str, tuple[str, ...]], seeds: Sequence[int], out: Path) -> list[Run]:
    """Every variation from every seed: ``OUT/seed-N/NAME``."""
    return [
        Run(name, seed, out / f"seed-{seed}" / name, words)
        for seed in dict.fromkeys(seeds)
        for name, words in variations.items()
    ]


def check(data: str) -> None:
    """Refuse to begin where the recipe or the data are not."""
    if not RECIPE.is_file():
        raise UserError(f"{RECIPE} is not here: run this in the repository's folder")
    if not (Path(data) / "manifest.json").is_file():
        raise UserError(
            f"--data ({data}) is not prepared; run `dsv3 data prepare recipes/data-tiny.yaml` first"
        )


def command(run: Run, steps: int, data: str) -> list[str]:
    """The ``dsv3 pretrain`` of a run: the tiny preset, and what the variation changes."""
    settings = {
        "out": run.folder, "seed": run.seed, "data.path": data, "sequence_length": LENGTH,
        "total_tokens": steps * SEQUENCES * LENGTH, "batch.sequences": SEQUENCES,
        "batch.micro_sequences": SEQUENCES, "device": "cpu", "schedule.batch": "[{until: 1, to: 1}]",
        "checkpoint.every": 250, "checkpoint.keep": 1, "validation.every": 250, "samples.every": 10**9,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "dsv3", "pretrain", str(RECIPE), *words, *run.words, "--resume", "auto"]


def train(
    runs: Sequence[Run],
    steps: int,
    data: str,
    workers: int,
    title: str,
    words_of: Callable[[Run], list[str]] | None = None,
) -> None:
    """Bring every run to its end, ``workers`` at a time.

    ``steps``: of a run, or about as many where ``words_of`` (a run's command, if another) does not fix them.
    """
    words_of = words_of or (lambda run: command(run, steps, data))
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), **os.environ}
    waiting, running = list(runs), dict[Run, subprocess.Popen[bytes]]()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs below are ended in any case
    done = sum(_count(run.folder) for run in runs)
    with Progress(title, steps * len(runs), "steps", done=done) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    run = waiting.pop(0)
                    run.folder.parent.mkdir(parents=True, exist_ok=True)
                    with open(f"{run.folder}.log", "ab") as log:
                        running[run] = subprocess.Popen(
                            words_of(run), stdout=log, stderr=log, env=environment
                        )
                time.sleep(2.0)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    if running.pop(run).returncode:
                        raise Failure(f"{run.name} failed; see {run.folder}.log")
                reached = {run: _count(run.folder) for run in runs}
                going = {*waiting, *running}
                progress.expect(sum(max(n, steps * (run in going)) for run, n in reached.items()))
                now = sum(reached.values())
                progress.note(", ".join(f"{run.name} of seed {run.seed}" for run in running))
                progress.advance(now - done)
                done = now
        finally:
            for process in running.values():
                process.terminate()  # each saves a checkpoint and stops
            for process in running.values():
                process.wait()


def _count(folder: Path) -> int:
    """The step a run has reached; those between a checkpoint and a kill have two lines."""
    path = folder / "metrics.jsonl"
    found = re.findall(rb'^\{"step": (\d+)', path.read_bytes(), re.MULTILINE) if path.exists() else []
    return int(found[-1]) if found else 0


def steps_of(run: Run) -> list[dict[str, Any]]:
    """The lines of a run's steps."""
    path = run.folder / "metrics.jsonl"
    return [line for line in read_lines(path) if "loss" in line] if path.exists() else []


def losses(run: Run) -> np.ndarray:
    """Training loss of the main head, step by step."""
    return np.array([line["loss"] for line in steps_of(run)])


def held_out(run: Run) -> float:
    """Held-out bits per byte at the end; NaN of a run that has not read any."""
    key = "validation_bits_per_byte"
    found = [line[key] for line in read_lines(run.folder / "metrics.jsonl") if key in line]
    return float(found[-1]) if found else math.nan


def by_name(runs: Sequence[Run], reference: str) -> dict[str, list[tuple[Run, Run]]]:
    """Of each variation its runs, each with the reference from the same seed."""
    references = {run.seed: run for run in runs if run.name == reference}
    found: dict[str, list[tuple[Run, Run]]] = {}
    for run in runs:
        found.setdefault(run.name, []).append((run, references[run.seed]))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and the half width of its 95 % interval (Student's t; infinite for one)."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), math.inf
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.96
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(count))
