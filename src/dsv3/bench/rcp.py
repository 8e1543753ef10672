"""``dsv3 bench rcp``: steps to a target from several seeds, checked against stored reference points.

The benchmark is ``recipes/rcp-tiny.yaml``: a run ends at the first reading of held-out text at or below its
target. The check is that of MLPerf's reference convergence points (mlcommons/logging, rcp_checker): the
slowest and the fastest run of either side are left out (a run that never arrives is the slowest; a second one
fails the check), and the mean of the rest must lie within what a t-test at 5 % allows, with the reference's
spread for both sides. MLPerf bounds the fast side only, since who converges slowly harms himself; here the
same bound holds on the slow side, where a change that does harm shows.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench.machine import commit, machine, today
from dsv3.bench.paired import Run, interval, train
from dsv3.bench.rcp_points import PAGE, Points, content
from dsv3.common.errors import Failure, UserError
from dsv3.common.files import write_atomic
from dsv3.config import recipe as recipes
from dsv3.config.train import PretrainRecipe
from dsv3.data.shards import check_content
from dsv3.train.run import read_lines

__all__ = ["PAGE", "as_reference", "bench", "check", "content", "report"]

NAME = "rcp-tiny"
RECIPE, POINTS, OUT = Path(f"recipes/{NAME}.yaml"), Path(f"recipes/{NAME}.json"), Path(f"runs/{NAME}")
LEAST = 3  # runs: two are left out
LEAST_REFERENCE = 6  # MLPerf: twice as many
COMMIT = "commit.txt"  # beside a run: what it was begun with

# Student's t, 95 % on one side, by degrees of freedom from 1.
_T = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753,
    1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697,
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """Mean steps of some runs and of the reference, without fastest and slowest; and what is allowed."""

    mean: float
    reference: float
    least: float
    most: float

    @property
    def verdict(self) -> str:
        """``passes``, ``slower``, ``faster``, or ``fails to converge``."""
        if math.isinf(self.mean):
            return "fails to converge"
        if self.mean > self.most:
            return "slower"
        return "faster" if self.mean < self.least else "passes"


def olympic(steps: Sequence[float]) -> float:
    """Mean without the smallest and the largest."""
    return float(np.mean(sorted(steps)[1:-1]))


def check(steps: Sequence[float], reference: Sequence[float]) -> Check:
    """MLPerf's rule, on both sides. Steps of a run that never arrived: infinite."""
    mean, ours, theirs = olympic(reference), len(steps) - 2, len(reference) - 2
    freedom = ours + theirs - 2
    quantile = _T[freedom - 1] if freedom <= len(_T) else 1.645
    half = quantile * float(np.std(reference)) * math.sqrt(1 / ours + 1 / theirs)
    return Check(olympic(steps), mean, mean - half, mean + half)


def steps_to(folder: Path, target: float) -> float:
    """Step of a run's first reading at or below the target; infinite where there is none."""
    path = folder / "metrics.jsonl"
    for line in read_lines(path) if path.exists() else ():
        if line.get("validation_loss", math.inf) <= target:
            return float(line["step"])
    return math.inf


def seconds_to(folder: Path, steps: float) -> float:
    """Seconds of the training steps up to there, without readings."""
    lines = [
        line for line in read_lines(folder / "metrics.jsonl") if "loss" in line and line["step"] <= steps
    ]
    tokens = np.diff([0, *(line["tokens"] for line in lines)])
    return float(sum(n / line["tokens_per_second"] for n, line in zip(tokens, lines)))


def prepare(words: Sequence[str]) -> PretrainRecipe:
    """The benchmark's recipe with the keys to be judged; refused where its data are not what it asks for."""
    if not RECIPE.is_file():
        raise UserError(f"{RECIPE} is not here: run this in the repository's folder")
    recipe = recipes.load(PretrainRecipe, RECIPE, list(words))
    if recipe.validation.target is None:
        raise UserError("validation.target (null) is what the steps are counted to; leave it as it is")
    data = Path(recipe.data.path)
    if not (data / "manifest.json").is_file():
        raise UserError(
            f"data.path ({data}) is not prepared; run `dsv3 data fetch recipes/manifest-kjv.yaml --to"
            " data/prose`, then `dsv3 data prepare recipes/rcp-data.yaml`"
        )
    check_content(data, recipe.data.tokenizer_sha256, recipe.data.tokens_sha256)
    return recipe


def runs_of(seeds: Sequence[int], out: Path | None, words: Sequence[str]) -> list[Run]:
    """A run a seed; without ``out`` in a folder named by the commit, what is changed in it, and the words."""
    if out is None:
        tail = "-" + hashlib.sha256("\0".join(words).encode()).hexdigest()[:6] if words else ""
        out = OUT / (commit() + tail)
    return [Run(NAME, seed, out / f"seed-{seed}" / NAME, tuple(words)) for seed in seeds]


def bench(
    seeds: int, out: Path | None, workers: int, words: Sequence[str], least: int = LEAST
) -> dict[str, Any]:
    """Train from seeds 0 .. ``seeds - 1`` as far as they are not, then compare with the reference points."""
    if seeds < least:
        raise UserError(
            f"--seeds ({seeds}) must be {least} or more, of which the fastest and the slowest are left out"
        )
    recipe = prepare(words)
    points = Points.load(POINTS, RECIPE)
    target = float(recipe.validation.target or 0)
    runs = runs_of(range(seeds), out, words)
    waiting = [run for run in runs if math.isinf(steps_to(run.folder, target))]
    for run in waiting:
        if not (mark := run.folder.parent / COMMIT).is_file():
            mark.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(mark, commit() + "\n")
    expected = round(olympic(points.reference["steps"])) if points.reference else 250
    if waiting:
        train(waiting, expected, recipe.data.path, workers, "bench rcp", _words)
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // workers)))
    return result(runs, target, points, words, threads)


def _words(run: Run) -> list[str]:
    settings = ["--seed", str(run.seed), "--out", str(run.folder), *run.words, "--resume", "auto"]
    return [sys.executable, "-m", "dsv3", "pretrain", str(RECIPE), *settings]


def result(
    runs: Sequence[Run], target: float, points: Points, words: Sequence[str], threads: int
) -> dict[str, Any]:
    """What the runs came to; None for steps of a run that did not arrive."""
    steps = [steps_to(run.folder, target) for run in runs]
    begun = dict.fromkeys((run.folder.parent / COMMIT).read_text().strip() for run in runs)
    row: dict[str, Any] = {
        "date": today(),
        "commit": ", ".join(begun),
        "words": list(words),
        "machine": {**machine("cpu"), "threads": threads},
        "target": target,
        "seeds": [run.seed for run in runs],
        "steps": [None if math.isinf(n) else int(n) for n in steps],
        "seconds": [round(seconds_to(run.folder, n), 1) for run, n in zip(runs, steps)],
    }
    if points.reference:
        found = check(steps, points.reference["steps"])
        same = dict(zip(points.reference["seeds"], points.reference["steps"]))
        pairs = [100 * (n / same[run.seed] - 1) for run, n in zip(runs, steps) if run.seed in same]
        row["check"] = {
            "verdict": found.verdict,
            "mean_steps": None if math.isinf(found.mean) else found.mean,
            "reference_mean_steps": found.reference,
            "least": found.least,
            "most": found.most,
        }
        if pairs and np.isfinite(pairs).all():
            row["check"]["paired_percent"] = interval(pairs)
    return row


def as_reference(row: dict[str, Any], note: str) -> dict[str, Any]:
    """The same as reference points; refused where a run did not arrive."""
    lost = [seed for seed, steps in zip(row["seeds"], row["steps"]) if steps is None]
    if lost:
        raise Failure(f"seed {lost[0]} did not reach the target: no reference points are made of these runs")
    return {"note": note, **{key: value for key, value in row.items() if key != "check"}}


def report(row: dict[str, Any]) -> str:
    """The steps of every seed, their spread, and the check."""
    lines = [f"steps to a held-out loss of {row['target']:g} nats a token ({row['commit']})"]
    for seed, steps, seconds in zip(row["seeds"], row["steps"], row["seconds"]):
        lines.append(f"  seed {seed:<3} {steps or 'not reached':>12}  {seconds:>8.1f} s of training")
    arrived = [steps for steps in row["steps"] if steps is not None]
    if len(arrived) > 1:
        mean, deviation = float(np.mean(arrived)), float(np.std(arrived, ddof=1))
        lines.append(f"mean {mean:.1f}, standard deviation {deviation:.1f} ({deviation / mean:.1%})")
    if "check" not in row:
        lines.append(f"no reference points in {POINTS}: --reference makes these the first")
        return "\n".join(lines)
    found = row["check"]
    ours = "not reached" if found["mean_steps"] is None else f"{found['mean_steps']:.1f}"
    lines.append(
        f"without fastest and slowest: {ours}; reference {found['reference_mean_steps']:.1f}, allowed"
        f" {found['least']:.1f} to {found['most']:.1f}: {found['verdict']}"
    )
    if "paired_percent" in found:
        mean, half = found["paired_percent"]
        lines.append(f"beside the reference's run from the same seed: {mean:+.1f} % +- {half:.1f} (95 %)")
    return "\n".join(lines)
