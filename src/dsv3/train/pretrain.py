"""``dsv3 pretrain``: puts a recipe's parts together and trains (report 4)."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from dsv3.checkpoint import run as checkpoints
from dsv3.checkpoint.hf import save, tokenizer_files
from dsv3.common.errors import UserError
from dsv3.common.files import TEMPORARY
from dsv3.config.train import PretrainRecipe, check_vocabulary
from dsv3.data.loader import TokenLoader
from dsv3.data.shards import open_split
from dsv3.data.tokenizer import Tokenizer
from dsv3.model import DeepSeekV3
from dsv3.quant import fp8
from dsv3.train import recompute
from dsv3.train.callbacks.checkpoints import Checkpoints, resume
from dsv3.train.callbacks.ema import EMA
from dsv3.train.callbacks.metrics import Metrics
from dsv3.train.callbacks.plots import Plots
from dsv3.train.callbacks.validation import Samples, Validation
from dsv3.train.callbacks.watch import Watch
from dsv3.train.optimizer import build
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Callback, Trainer

__all__ = ["pretrain"]


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device ({name}) is unknown; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device ({name}) is not there; use --device cpu")
    return device


def make_model(recipe: PretrainRecipe, device: torch.device) -> DeepSeekV3:
    """The model of a recipe with its initial weights, precision, recompute and compilation."""
    with torch.device(device):
        model = DeepSeekV3(recipe.model, seed=recipe.seed)
    if recipe.precision == "bf16" or (recipe.precision == "fp8" and device.type != "cpu"):
        model.model.embed_tokens.compute_dtype = torch.bfloat16
    if recipe.precision == "fp8":
        fp8.apply(model, recipe.fp8)
    recompute.apply(model, recipe.recompute)
    if recipe.compile:
        for layer in model.model.layers:
            layer.compile()
    return model


def pretrain(recipe: PretrainRecipe, resume_from: str | None = None) -> Path:
    """Train by ``recipe``; returns the run folder.

    ``resume_from``: None starts anew (and refuses a folder that holds a run), ``auto`` goes on from the
    newest whole checkpoint of the run folder if there is one, a path from that checkpoint.
    Raises :class:`UserError` for bad input before anything is written, :class:`TrainingFailed` if the run
    cannot go on.
    """
    device = choose_device(recipe.device)
    data = Path(recipe.data.path)
    train, valid = (
        [(shards, weight) for _, shards, weight in open_split(data, s)] for s in ("train", "valid")
    )
    tokenizer = Tokenizer.load(data)
    check_vocabulary(recipe.model, tokenizer.vocab_size)
    length, extra = recipe.sequence_length, 1 + recipe.model.num_nextn_predict_layers
    loader = TokenLoader(train, length, extra, recipe.seed, mask_documents=recipe.data.mask_documents)
    held_out = TokenLoader(valid, length, extra, seed=0)
    sequences = min(recipe.validation.sequences, sum(held_out.samples))

    files = tokenizer_files(data)
    if resume_from not in (None, "auto"):
        if not Path(str(resume_from)).is_dir():
            raise UserError(
                f"--resume ({resume_from}) is no checkpoint's folder; use auto or OUT/checkpoints/step-..."
            )
        checkpoints.verify(str(resume_from))  # before anything is written

    run = RunFolder(recipe.out)
    run.begin(recipe, resume=resume_from is not None)
    checkpoint = _find_checkpoint(run, resume_from)

    model = make_model(recipe, device)
    ema = EMA(recipe.ema.decay) if recipe.ema.decay else None
    callbacks: list[Callback] = [
        Metrics(run),
        Watch(run),
        Validation(
            run, held_out.batch(0, sequences).tokens_BT, torch.from_numpy(tokenizer.byte_lengths).long()
        ),
        Samples(run, tokenizer),
        *([ema] if ema is not None else []),
        Checkpoints(run, files),
        Plots(run),
    ]
    trainer = Trainer(recipe, model, loader, build(model, recipe.optimizer, recipe.precision), callbacks)
    if checkpoint is not None:
        changed = resume(trainer, checkpoint)
        run.rewind(trainer.state.step)
        run.log(f"resumed from {checkpoint.name} at {trainer.state.tokens} tokens")
        if changed:
            run.log(f"changed since it was saved: {'; '.join(changed)}")
        if trainer.finished:
            run.log(f"all {recipe.total_tokens} tokens are seen already; raise --total_tokens to go on")
    trainer.train()
    if trainer.stopping:
        run.log(f"stopped by {trainer.stopping} at step {trainer.state.step}; checkpoint saved")
    else:
        _export(model, run.path / "model", files)
        run.log(f"finished after {trainer.state.step} steps; the model is in {run.path / 'model'}")
        if ema is not None:
            ema.load_into(model)
            _export(model, run.path / "model-ema", files)
            run.log(f"the moving average of its weights is in {run.path / 'model-ema'}")
    return run.path


def _find_checkpoint(run: RunFolder, resume_from: str | None) -> Path | None:
    if resume_from is None:
        return None
    if resume_from != "auto":
        return Path(resume_from)
    found, messages = checkpoints.latest(run.checkpoints)
    for message in messages:
        run.log(f"{message}; the checkpoint before it is used")
    return found


def _export(model: DeepSeekV3, target: Path, files: list[Path]) -> None:
    """A Hugging Face folder of the finished model; one of a shorter run before gives way to it."""
    fresh, old = (target.with_name(f"{TEMPORARY}{kind}-{target.name}") for kind in ("new", "old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    save(model, fresh, tokenizer_files=files)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
