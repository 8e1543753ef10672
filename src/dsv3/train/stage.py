"""What every training stage does around its objective: device, model, run folder, resume, train, export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from dsv3.checkpoint import distributed
from dsv3.checkpoint import run as checkpoints
from dsv3.checkpoint.hf import save, stored_integers
from dsv3.checkpoint.weights import Weights as Files
from dsv3.common.errors import UserError
from dsv3.common.files import TEMPORARY
from dsv3.config.parallel import ParallelSection
from dsv3.config.train import TrainRecipe
from dsv3.model import DeepSeekV3
from dsv3.parallel.weights import Weights
from dsv3.parallel.world import World
from dsv3.quant import fp8
from dsv3.train import recompute
from dsv3.train.callbacks.checkpoints import Checkpoints, fill_share, resume
from dsv3.train.callbacks.ema import EMA
from dsv3.train.callbacks.metrics import Metrics
from dsv3.train.callbacks.plots import Plots
from dsv3.train.callbacks.ranks import Ranks
from dsv3.train.callbacks.watch import Watch
from dsv3.train.optimizer import build
from dsv3.train.run import RunFolder
from dsv3.train.schedules import Extent, Schedules
from dsv3.train.trainer import Callback, Objective, Trainer


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


def make_model(recipe: TrainRecipe, device: torch.device, world: World | None = None) -> DeepSeekV3:
    """The model of a recipe: initial or ``start``'s weights in FP32, precision, recompute and compilation.

    Where ``world`` is many processes, each reads its part of ``start`` when it has one (:func:`train_stage`).
    """
    check_start(recipe)
    with torch.device(device):
        model = DeepSeekV3(recipe.model, seed=recipe.seed)
    if recipe.start is not None and (world is None or world.size == 1):
        with Files(recipe.start) as weights:
            weights.fill(model)
    if recipe.precision == "bf16" or (recipe.precision == "fp8" and device.type != "cpu"):
        model.model.embed_tokens.compute_dtype = torch.bfloat16
    if recipe.precision == "fp8":
        fp8.apply(model, recipe.fp8)
    recompute.apply(model, recipe.recompute)
    if recipe.compile:
        for layer in model.model.layers:
            layer.compile()
    return model


def check_start(recipe: TrainRecipe) -> None:
    """Refuse a ``start`` whose tensors are not the model's, from its files' headers."""
    if recipe.start is not None:
        if packed := stored_integers(Path(recipe.start)):
            raise UserError(
                f"start ({recipe.start}) is int{packed.bits}, which cannot be trained; "
                "give the folder that it was made from"
            )
        with torch.device("meta"):
            model = DeepSeekV3(recipe.model)
        with Files(recipe.start) as weights:
            weights.check(model)


def check_shares(recipe: TrainRecipe, extent: Extent, world: World) -> None:
    """Refuse batches that the data ranks cannot share evenly."""
    micro, ranks = recipe.batch.micro_sequences, world.data_size
    if micro % ranks:
        raise UserError(
            f"batch.micro_sequences ({micro}) must be a multiple of the {ranks} data ranks, which share a "
            f"forward and backward pass; try {-(-micro // ranks) * ranks}"
        )
    chunks = 2 * world.layout.context
    if chunks > 2 and recipe.sequence_length % chunks:
        raise UserError(
            f"sequence_length ({recipe.sequence_length}) must be a multiple of {chunks}, twice "
            f"parallel.context; try {-(-recipe.sequence_length // chunks) * chunks}"
        )
    least = micro  # of its halves, the smallest that can be shared
    while least % 2 == 0 and least // 2 % ranks == 0:
        least //= 2
    schedules, seen = Schedules(recipe, extent), 0
    while seen < extent.total and (sequences := schedules.sequences(seen)) < micro:  # where a ramp begins
        if sequences % ranks:
            raise UserError(
                f"schedule.batch has steps of {sequences} sequences, which {ranks} data ranks cannot share; "
                f"let it begin with {least} or more"
            )
        seen += sequences * extent.each


def open_run(
    recipe: TrainRecipe, resume_from: str | None, world: World | None = None
) -> tuple[RunFolder, Path | None]:
    """The run's folder, and the checkpoint to go on from.

    ``world``: the processes of a stage that knows how to be many (:func:`dsv3.parallel.world.enter`).

    ``resume_from``: None starts anew (and refuses a folder that holds a run), ``auto`` goes on from the
    newest whole checkpoint of the run folder if there is one, a path from that checkpoint. Call it when
    everything else of the recipe has been checked: it writes the folder.
    """
    if world is None and (recipe.parallel != ParallelSection() or "WORLD_SIZE" in os.environ):
        raise UserError(f"dsv3 {recipe.stage} runs in one process: leave parallel and torchrun away")
    world = world or World()
    if resume_from not in (None, "auto"):
        if not Path(str(resume_from)).is_dir():
            raise UserError(
                f"--resume ({resume_from}) is no checkpoint's folder; use auto or OUT/checkpoints/step-..."
            )
        checkpoints.verify(str(resume_from))  # before anything is written
    run = RunFolder(recipe.out, writes=world.is_first)
    run.begin(recipe, resume=resume_from is not None)
    world.barrier()
    if resume_from != "auto":
        return run, None if resume_from is None else Path(resume_from)
    step = -1
    if world.is_first:  # it reads every file; the others take its word
        found, messages = checkpoints.latest(run.checkpoints)
        for message in messages:
            run.log(f"{message}; the checkpoint before it is used")
        step = -1 if found is None else int(found.name.removeprefix("step-"))
    step = int(world.gather([step])[0][0])
    return run, None if step < 0 else checkpoints.step_folder(run.checkpoints, step)


def train_stage(
    recipe: TrainRecipe,
    model: DeepSeekV3,
    objective: Objective,
    run: RunFolder,
    checkpoint: Path | None,
    files: Sequence[Path],
    callbacks: Sequence[Callback] = (),
    world: World | None = None,
) -> Path | None:
    """Train ``model`` to the objective's end and export ``OUT/model``.

    Returns the run's folder, None when a signal stopped it before its end.

    ``files`` are the tokenizer's, kept beside the weights. ``callbacks`` are the stage's own, beside those of
    every stage (the objective too, if it is one). Raises :class:`TrainingFailed` if the run cannot go on.
    """
    world = world or World()
    ema = EMA(recipe.ema.decay) if recipe.ema.decay else None
    first = [Metrics(run), Watch(run)] if world.is_first else []
    everyone: list[Callback] = [
        *first, *callbacks, *([ema] if ema is not None else []), Checkpoints(run, list(files)),
        *([Plots(run)] if world.is_first else []),
    ]  # fmt: skip
    pipeline = world.cut(model, recipe.sequence_length)
    weights, traffic = world.spread(model, pipeline, fp8=recipe.precision == "fp8")
    if world.size > 1:
        everyone.append(Ranks(run, traffic))
    optimizer = build(weights, recipe.optimizer, recipe.precision)
    trainer = Trainer(recipe, model, objective, optimizer, everyone, world, weights, pipeline)
    if checkpoint is None and recipe.start is not None and world.size > 1:
        fill_share(trainer, Path(recipe.start))
    if checkpoint is not None:
        changed = resume(trainer, checkpoint)
        run.rewind(trainer.state.step)
        run.log(f"resumed from {checkpoint.name} at {trainer.state.tokens} tokens")
        if changed:
            run.log(f"changed since it was saved: {'; '.join(changed)}")
        if trainer.finished:
            run.log("the run is at its end already")
    trainer.train()
    if trainer.stopping:
        run.log(f"stopped by {trainer.stopping} at step {trainer.state.step}; checkpoint saved")
        return None
    export(model, run.path / "model", files, world, weights)
    run.log(f"finished after {trainer.state.step} steps; the model is in {run.path / 'model'}")
    if ema is not None:
        ema.load_into(weights)
        export(model, run.path / "model-ema", files, world, weights)
        run.log(f"the moving average of its weights is in {run.path / 'model-ema'}")
    return run.path


def export(
    model: DeepSeekV3,
    target: Path,
    files: Sequence[Path],
    world: World | None = None,
    weights: Weights | None = None,
) -> None:
    """A Hugging Face folder of the finished model; one of a shorter run before gives way to it.

    Of many processes each writes a file: what it was dealt of the experts, and a share of the rest.
    """
    world = world or World()
    fresh, old = (target.with_name(f"{TEMPORARY}{kind}-{target.name}") for kind in ("new", "old"))
    if world.is_first:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
    if world.beside is None or weights is None:
        save(model, fresh, tokenizer_files=files)
    else:
        distributed.export(fresh, world.share(model, weights), model.config, world.beside, files)
    if world.is_first:
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    world.barrier()
