"""``dsv3 pretrain``: puts a recipe's parts together and trains (report 4)."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3.checkpoint.hf import tokenizer_files
from dsv3.config.train import PretrainRecipe, check_vocabulary
from dsv3.data.loader import TokenLoader
from dsv3.data.long import mix
from dsv3.data.shards import check_content, open_split
from dsv3.data.tokenizer import Tokenizer
from dsv3.parallel.world import enter, local_device
from dsv3.train.callbacks.mlperf import MLPerf
from dsv3.train.callbacks.validation import Samples, Validation, beside
from dsv3.train.objective import LanguageModelling
from dsv3.train.stage import check_shares, check_start, choose_device, make_model, open_run, train_stage


def loaders(recipe: PretrainRecipe, rank: int = 0, world: int = 1) -> tuple[TokenLoader, TokenLoader]:
    """The recipe's training samples and its held-out ones; :class:`UserError` where there is too little.

    ``rank`` of ``world``: whose share of every training batch.
    """
    train, valid = (
        [(shards, weight) for _, shards, weight in open_split(recipe.data.path, split)]
        for split in ("train", "valid")
    )
    length, extra = recipe.sequence_length, 1 + recipe.model.num_nextn_predict_layers
    mixed = mix(train, recipe.data.long_share, length, extra)
    loader = TokenLoader(mixed, length, extra, recipe.seed, rank, world, recipe.data.mask_documents)
    return loader, TokenLoader(valid, length, extra, seed=0)


def pretrain(recipe: PretrainRecipe, resume_from: str | None = None) -> Path | None:
    """Train by ``recipe``; returns the run folder, None when a signal stopped the run before its end.

    ``resume_from``: see :func:`dsv3.train.stage.open_run`. Raises :class:`UserError` for bad input before
    anything is written, :class:`TrainingFailed` if the run cannot go on.
    """
    device = local_device(choose_device(recipe.device))
    data = Path(recipe.data.path)
    world = enter(recipe.parallel, recipe.model, device)
    loader, held_out = loaders(recipe, world.data_rank, world.data_size)
    check_content(data, recipe.data.tokenizer_sha256, recipe.data.tokens_sha256)
    tokenizer = Tokenizer.load(data)
    check_vocabulary(recipe.model, tokenizer.vocab_size)
    sequences = min(recipe.validation.sequences, sum(held_out.samples))
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths).long()
    check_start(recipe)
    objective = LanguageModelling(loader, recipe.sequence_length, recipe.total_tokens)
    check_shares(recipe, objective.extent, world)
    log = None
    if recipe.log.report_to == "mlperf" and world.is_first:
        log = MLPerf(Path(recipe.out), sum(loader.samples))

    files = tokenizer_files(data)
    run, checkpoint = open_run(recipe, resume_from, world)
    model = make_model(recipe, device, world)
    validation = Validation(run, held_out.batch(0, sequences), byte_lengths, recipe.validation)
    samples = Samples(run, tokenizer, recipe.samples, tokenizer.encode)
    callbacks = beside(run, world, validation, samples)
    if log is not None:
        callbacks.insert(1, log)  # behind validation
    return train_stage(recipe, model, objective, run, checkpoint, files, callbacks, world)
