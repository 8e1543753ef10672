"""``dsv3 sft``: supervised fine-tuning (report 5.1), the pre-training objective over packed examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.hf import tokenizer_files
from dsv3.common.errors import UserError
from dsv3.common.progress import Progress
from dsv3.config.sft import SFTRecipe
from dsv3.config.train import check_vocabulary
from dsv3.data import chat, rows
from dsv3.data.examples import Examples, gather
from dsv3.data.packing import ExampleLoader
from dsv3.data.tokenizer import Tokenizer
from dsv3.parallel.world import enter, local_device
from dsv3.train.callbacks.validation import Samples, Validation, beside
from dsv3.train.logits import Teacher
from dsv3.train.objective import LanguageModelling
from dsv3.train.stage import check_shares, check_start, choose_device, make_model, open_run, train_stage
from dsv3.train.trainer import Callback, Trainer


def sft(recipe: SFTRecipe, resume_from: str | None = None) -> Path | None:
    """Fine-tune by ``recipe``; returns the run folder, None when a signal stopped the run before its end.

    ``resume_from``: see :func:`dsv3.train.stage.open_run`. Raises :class:`UserError` for bad input, examples
    included, before anything is written, :class:`TrainingFailed` if the run cannot go on.
    """
    device = local_device(choose_device(recipe.device))
    tokenizer = open_tokenizer(recipe)
    check_start(recipe)
    world = enter(recipe.parallel, recipe.model, device)
    train, held_out = read_examples(recipe, tokenizer, world.is_first)
    length, extra, pad = recipe.sequence_length, 1 + recipe.model.num_nextn_predict_layers, tokenizer.pad_id
    loader = ExampleLoader(
        train, length, extra, recipe.epochs, recipe.seed, pad, world.data_rank, world.data_size
    )
    valid = ExampleLoader(held_out, length, extra, pad_id=pad)
    files = tokenizer_files(Path(str(recipe.start)))
    teacher = Teacher.load(recipe.teacher, tokenizer, recipe.model.vocab_size, device)
    if teacher is not None and world.layout.pipeline * world.layout.context > 1:
        raise UserError(
            "teacher.path goes with neither parallel.pipeline nor parallel.context: leave it or them away"
        )
    objective = LanguageModelling(loader, length, len(loader) * length, teacher)
    check_shares(recipe, objective.extent, world)

    run, checkpoint = open_run(recipe, resume_from, world)
    run.log(
        f"{len(train)} examples of {train.lengths.mean():.0f} tokens, {train.bears.mean():.0%} of them bear"
        f" loss; {recipe.epochs} epochs are {len(loader)} sequences, {loader.padding:.1%} padding;"
        f" {len(held_out)} examples are held out"
    )
    if train.cut or train.dropped:
        run.log(f"of {train.read} rows {train.cut} were cut and {train.dropped} dropped at {length} tokens")
    model = make_model(recipe, device, world)
    validation = Validation(
        run,
        valid.batch(0, min(recipe.validation.sequences, len(valid))),
        torch.from_numpy(tokenizer.byte_lengths).long(),
        recipe.validation,
    )
    samples = Samples(run, tokenizer, recipe.samples, lambda text: question(tokenizer, text))
    callbacks = [SameExamples(train), *beside(run, world, validation, samples)]
    return train_stage(recipe, model, objective, run, checkpoint, files, callbacks, world)


def open_tokenizer(recipe: SFTRecipe) -> Tokenizer:
    """The tokenizer of ``start``; :class:`UserError` if it is not the model's or knows no conversation."""
    if recipe.start is None:
        raise UserError("start is required: the Hugging Face folder to begin from")
    tokenizer = Tokenizer.load(recipe.start)
    check_vocabulary(recipe.model, tokenizer.vocab_size)
    for name in ("bos", "eos", "pad", "user", "assistant"):
        tokenizer.special(name)
    return tokenizer


def read_examples(recipe: SFTRecipe, tokenizer: Tokenizer, shown: bool) -> tuple[Examples, Examples]:
    """Examples to train on and examples held out, tokenised. ``shown``: with progress."""
    data = recipe.data
    found = _gather(recipe, tokenizer, data.train, shown)
    if data.valid:
        return found, _gather(recipe, tokenizer, data.valid, shown)
    train, held_out = found.split(data.valid_fraction)
    if not len(held_out) or not len(train):
        dropped = ""
        if found.dropped:
            dropped = f" ({found.dropped} dropped: too long for sequence_length {recipe.sequence_length})"
        raise UserError(
            f"data.valid_fraction ({data.valid_fraction:g}) of {found.read} rows{dropped} leaves {len(train)}"
            f" examples to train on and {len(held_out)} held out; change"
            f" {'sequence_length' if dropped else 'it'}, or name data.valid"
        )
    return train, held_out


def _gather(recipe: SFTRecipe, tokenizer: Tokenizer, paths: tuple[str, ...], shown: bool) -> Examples:
    progress = Progress("tokenise", rows.count(paths), "rows") if shown else None
    with progress or nullcontext():
        return gather(
            rows.read(paths) if progress is None else _watched(rows.read(paths), progress),
            tokenizer,
            recipe.sequence_length,
            keep_think=recipe.data.keep_think,
            long=recipe.data.long,
        )


def _watched(found: Iterator[rows.Row], progress: Progress) -> Iterator[rows.Row]:
    for row in found:
        yield row
        progress.advance(1)


def question(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a first question, up to where the assistant is about to answer."""
    return chat.encode(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)[0]


class SameExamples(Callback):
    """Refuses to go on over other examples than the run began with: their place in it would be another."""

    def __init__(self, examples: Examples):
        self.fingerprint = torch.tensor([examples.fingerprint()])

    def on_checkpoint(self, trainer: Trainer) -> dict[str, Tensor]:
        """The examples' fingerprint, under ``sft/``."""
        return {"sft/examples": self.fingerprint}

    def on_resume(self, trainer: Trainer, tensors: dict[str, Tensor]) -> None:
        """Compare."""
        if not torch.equal(tensors["sft/examples"].cpu(), self.fingerprint):
            raise UserError(
                "the examples of data.train are not those the run began with: put the old files back, or"
                " choose another --out"
            )
