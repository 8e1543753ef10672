"""Checkpoints while training: saved every so often, on a signal and at the end; old ones removed.

One process writes while it waits. Of many, each copies what it updates to CPU memory and writes it in a
thread while training goes on; the folder appears when all have written.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dsv3.checkpoint import distributed
from dsv3.checkpoint import run as checkpoints
from dsv3.common.errors import UserError
from dsv3.config.recipe import differences
from dsv3.parallel.world import biases
from dsv3.train.optimizer import load_state_tensors, state_tensors
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Callback, Progressed, StepReport, Trainer


class Checkpoints(Callback):
    """Saves model, optimizer, what other callbacks keep, and how far the run has come."""

    def __init__(self, run: RunFolder, tokenizer_files: list[Path]):
        self.run = run
        self.tokenizer_files = tokenizer_files
        self.saved_step = -1
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None

    def save(self, trainer: Trainer) -> None:
        """Write ``checkpoints/step-NNNNNN``, whole or not at all, then drop the oldest."""
        if trainer.state.step == self.saved_step:
            return
        self.finish(trainer)
        folder = checkpoints.step_folder(self.run.checkpoints, trainer.state.step)
        state = {"progress": asdict(trainer.state), "recipe": trainer.recipe.model_dump(mode="json")}
        tensors: dict[str, Tensor] = state_tensors(trainer.optimizer, trainer.weights)
        for callback in trainer.callbacks:
            tensors.update(callback.on_checkpoint(trainer))
        self.saved_step = trainer.state.step
        if trainer.world.beside is None:
            checkpoints.write(
                folder,
                model=trainer.model,
                tensors=tensors,
                state=state,
                tokenizer_files=self.tokenizer_files,
            )
            checkpoints.keep_last(self.run.checkpoints, trainer.recipe.checkpoint.keep)
            return
        self.pending = self.pool.submit(
            distributed.write,
            folder,
            tensors=staged(trainer, tensors),
            config=trainer.model.config,
            state=state,
            group=trainer.world.beside,
            tokenizer_files=self.tokenizer_files,
        )

    def finish(self, trainer: Trainer) -> None:
        """Wait for a save that is under way; raises what it raised."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
            if trainer.world.is_first:
                checkpoints.keep_last(self.run.checkpoints, trainer.recipe.checkpoint.keep)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Save every ``checkpoint.every`` steps."""
        if trainer.state.step % trainer.recipe.checkpoint.every == 0:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save where the run ended or was asked to stop."""
        self.save(trainer)
        self.finish(trainer)
        self.pool.shutdown()


def staged(trainer: Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory of what this rank saves, each as the part it is of a whole."""
    pieces = trainer.weights.pieces
    found = {}
    weights = {f"weight/{name}": p for name, p in trainer.weights.named_parameters()}
    for key, tensor in {**weights, **tensors}.items():
        if key.partition("/")[2] in trainer.weights.elsewhere:
            continue
        copy = tensor.detach().to("cpu", copy=True)
        piece = pieces.get(key.partition("/")[2])
        found[key] = piece.distributed(copy) if piece is not None and copy.dim() else copy
    return {**found, **{key: bias.detach().to("cpu", copy=True) for key, bias in _biases(trainer).items()}}


def _biases(trainer: Trainer) -> dict[str, Tensor]:
    return {f"weight/{name}": bias for name, bias in biases(trainer.model)}


# Keys that may differ when a run goes on: where it runs and what it writes, not what it computes.
_MAY_CHANGE = {
    "out", "device", "compile", "recompute", "max_skipped", "checkpoint", "validation", "samples", "log",
    "total_tokens", "steps", "evaluation", "shown", "optimizer", "schedule", "balance", "mtp", "precision",
    "fp8", "parallel", "mlperf",
}  # fmt: skip


def resume(trainer: Trainer, folder: Path) -> list[str]:
    """Take up a run from a checkpoint: weights, biases, moments, position in the data.

    Returns the keys that are now other than when it was saved, as ``optimizer.lr 0.002 -> 0.001``.
    """
    state = distributed.read_state(folder)
    before, now = _as_read_now(trainer, state["recipe"]), trainer.recipe.model_dump(mode="json")
    for key in now:
        if key in _MAY_CHANGE or before.get(key) == now[key]:
            continue
        if key == "batch":  # the step's size may change, the loader counts sequences
            continue
        name, was, asked = differences(before.get(key), now[key], key)[0]
        raise UserError(
            f"{name} ({asked}) differs from the run in {folder.parent.parent} ({was}); "
            "use that run's recipe.yaml, or another --out"
        )
    tensors = _load(trainer, folder)
    trainer.state = Progressed(**state["progress"])
    load_state_tensors(trainer.optimizer, trainer.weights, tensors)
    for callback in trainer.callbacks:
        callback.on_resume(trainer, tensors)
    return [f"{key} {was} -> {is_now}" for key, was, is_now in differences(before, now) if key != "out"]


_STATES = ("exp_avg", "exp_avg_sq", "ema", "step")  # what is kept of each parameter beside itself


def _of_callbacks(key: str) -> bool:
    """Whether a checkpoint's tensor is what a callback keeps: every rank has it whole."""
    return key.partition("/")[0] not in ("weight", *_STATES)


def _load(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """Weights and biases into the run, from a checkpoint of any layout; returns this rank's other tensors."""
    if distributed.is_distributed(folder):
        return _load_shared(trainer, folder)
    if trainer.world.size == 1:
        return checkpoints.read_into(folder, trainer.model)[0]
    fill_share(trainer, folder)
    found: dict[str, Tensor] = {}
    with distributed.Rows(folder) as rows:
        for name, piece in trainer.weights.pieces.items():
            for kind in _STATES:
                key = f"{kind}/{name}"
                dtype = rows.state_dtype(key)
                if dtype is not None:
                    shape = () if kind == "step" else piece.local.shape
                    found[key] = torch.empty(shape, dtype=dtype)
                    rows.state(key, 0 if kind == "step" else piece.first, found[key])
        for key, (dtype, whole) in rows.states().items():
            if _of_callbacks(key):
                found[key] = torch.empty(whole, dtype=dtype)
                rows.state(key, 0, found[key])
    return found


def fill_share(trainer: Trainer, folder: Path) -> None:
    """Weights and biases from a folder of one process's: a rank reads what it updates, and no more."""
    with distributed.Rows(folder) as rows:
        for name, piece in trainer.weights.pieces.items():
            rows.weight(name, piece.first, piece.local.detach())
        for key, bias in _biases(trainer).items():
            rows.weight(key.partition("/")[2], 0, bias)
    trainer.weights.publish()


def _load_shared(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """The same from a checkpoint that many processes wrote."""
    held = distributed.kinds(folder)
    wanted: dict[str, Tensor] = dict(_biases(trainer))
    found: dict[str, Tensor] = {}
    for name, piece in trainer.weights.pieces.items():
        wanted[f"weight/{name}"] = piece.distributed(piece.local.detach())
        for kind in _STATES:
            key = f"{kind}/{name}"
            if key in held:
                shape = () if kind == "step" else piece.local.shape
                found[key] = torch.empty(shape, dtype=held[key][0])
                wanted[key] = piece.distributed(found[key]) if shape else found[key]
    for key, (dtype, whole) in held.items():
        if _of_callbacks(key):
            found[key] = wanted[key] = torch.empty(whole, dtype=dtype)
    distributed.read(folder, wanted)
    trainer.weights.publish()
    return found


def _as_read_now(trainer: Trainer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe with the defaults of keys that came since; as it stands where a key of it is gone."""
    try:
        return type(trainer.recipe).model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved
