"""Checkpoints while training: saved every so often, on a signal and at the end; old ones removed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv3.checkpoint import run as checkpoints
from dsv3.common.errors import UserError
from dsv3.train.optimizer import load_state_tensors, state_tensors
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Callback, Progressed, StepReport, Trainer


class Checkpoints(Callback):
    """Saves model, optimizer, what other callbacks keep, and how far the run has come."""

    def __init__(self, run: RunFolder, tokenizer_files: list[Path]):
        self.run = run
        self.tokenizer_files = tokenizer_files
        self.saved_step = -1

    def save(self, trainer: Trainer) -> None:
        """Write ``checkpoints/step-NNNNNN``, whole or not at all, then drop the oldest."""
        if trainer.state.step == self.saved_step:
            return
        tensors: dict[str, Tensor] = state_tensors(trainer.optimizer, trainer.model)
        for callback in trainer.callbacks:
            tensors.update(callback.on_checkpoint(trainer))
        checkpoints.write(
            self.run.checkpoints / f"step-{trainer.state.step:06d}",
            model=trainer.model,
            tensors=tensors,
            state={"progress": asdict(trainer.state), "recipe": trainer.recipe.model_dump(mode="json")},
            tokenizer_files=self.tokenizer_files,
        )
        self.saved_step = trainer.state.step
        checkpoints.keep_last(self.run.checkpoints, trainer.recipe.checkpoint.keep)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Save every ``checkpoint.every`` steps."""
        if trainer.state.step % trainer.recipe.checkpoint.every == 0:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save where the run ended or was asked to stop."""
        self.save(trainer)


# Keys that may differ when a run goes on: where it runs and what it writes, not what it computes.
_MAY_CHANGE = {
    "out", "device", "compile", "recompute", "max_skipped", "checkpoint", "validation", "samples", "log",
    "total_tokens", "steps", "evaluation", "shown", "optimizer", "schedule", "balance", "mtp", "precision",
    "fp8",
}  # fmt: skip


def resume(trainer: Trainer, folder: Path) -> list[str]:
    """Take up a run from a checkpoint: weights, biases, moments, position in the data.

    Returns the keys that are now other than when it was saved, as ``optimizer.lr 0.002 -> 0.001``.
    """
    tensors, state = checkpoints.read_into(folder, trainer.model)
    before, now = state["recipe"], trainer.recipe.model_dump(mode="json")
    for key in now:
        if key in _MAY_CHANGE or before.get(key) == now[key]:
            continue
        if key == "batch":  # the step's size may change, the loader counts sequences
            continue
        raise UserError(
            f"{key} ({now[key]}) differs from the run in {folder.parent.parent} ({before.get(key)}); "
            "use that run's recipe.yaml, or another --out"
        )
    trainer.state = Progressed(**state["progress"])
    load_state_tensors(trainer.optimizer, trainer.model, tensors)
    for callback in trainer.callbacks:
        callback.on_resume(trainer, tensors)
    return _differences(before, now)


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in now if name != "out" or key]
        return [line for name in names for line in _differences(before.get(name), now[name], f"{key}.{name}")]
    return [] if before == now else [f"{key[1:]} {before} -> {now}"]
