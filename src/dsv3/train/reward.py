"""``dsv3 reward``: a scalar head on the SFT model, trained on preferences by Bradley and Terry (report 5.2).

P(chosen above rejected) = sigmoid(r(chosen) - r(rejected)), and the loss is its negative logarithm.

Shapes: B pairs, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dsv3.checkpoint.hf import tokenizer_files
from dsv3.common.errors import UserError
from dsv3.config.reward import RewardRecipe
from dsv3.config.train import check_vocabulary
from dsv3.data.permutation import combine, permute
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluate.preferences import Pair, encode_pairs, is_held_out, padded, read_rows
from dsv3.evaluate.reward_model import pair_accuracy
from dsv3.model import DeepSeekV3
from dsv3.model.moe import RouterStats
from dsv3.model.score import add_score, scores
from dsv3.train.callbacks.repeated import Repeated
from dsv3.train.run import RunFolder, read_lines
from dsv3.train.schedules import Extent
from dsv3.train.stage import check_start, choose_device, make_model, open_run, train_stage
from dsv3.train.trainer import Accumulated, Trainer


def preference_loss(
    model: DeepSeekV3, pairs: Sequence[Pair], pad_id: int
) -> tuple[Tensor, Tensor, dict[int, RouterStats]]:
    """Sum over pairs of -log sigmoid(r(chosen) - r(rejected)); the differences ``[B]``; what was routed."""
    ids, last = padded([*(p.chosen for p in pairs), *(p.rejected for p in pairs)], pad_id)
    device = model.lm_head.weight.device
    values, router = scores(model, ids.to(device), last.to(device))
    margin_B = values[: len(pairs)] - values[len(pairs) :]
    return -F.logsigmoid(margin_B).sum(), margin_B.detach(), router


class BradleyTerry:
    """The objective: every epoch sees all pairs, in an order of its own."""

    def __init__(self, pairs: Sequence[Pair], epochs: int, seed: int, pad_id: int):
        self.pairs, self.seed, self.pad_id = pairs, seed, pad_id
        self.extent = Extent("samples", len(pairs) * epochs, 1)

    def take(self, first: int, count: int) -> list[Pair]:
        """Pairs ``first`` to before ``first + count`` of the run; fewer where it ends."""
        size = len(self.pairs)
        index = np.arange(first, min(first + count, self.extent.total))
        epoch, place = np.divmod(index, size)
        return [self.pairs[at] for at in permute(place, size, combine(self.seed, epoch))]

    def accumulate(self, trainer: Trainer, sequences: int) -> Accumulated:
        """Gradients of the mean over the step's pairs, one micro batch at a time."""
        pairs = self.take(trainer.state.samples, sequences)
        micro = trainer.recipe.batch.micro_sequences
        loss, margins = 0.0, []
        for start in range(0, len(pairs), micro):
            total, margin_B, router = preference_loss(
                trainer.model, pairs[start : start + micro], self.pad_id
            )
            (total / len(pairs)).backward()
            trainer.balancer.add(router)
            loss += float(total.detach()) / len(pairs)
            margins.append(margin_B)
        margin = torch.cat(margins)
        tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        metrics = {"accuracy": float((margin > 0).float().mean()), "margin": float(margin.mean())}
        return Accumulated(loss, tokens, metrics)


class HeldOutPairs(Repeated):
    """Accuracy on pairs whose prompts are not trained on: before the first step, now and then, at the end."""

    def __init__(self, run: RunFolder, pairs: Sequence[Pair], pad_id: int, every: int):
        super().__init__(every, first=True)
        self.run, self.pairs, self.pad_id = run, pairs, pad_id

    def read(self, trainer: Trainer) -> None:
        """A line of metrics and one for people."""
        trainer.model.eval()
        found, loss = pair_accuracy(trainer.model, self.pairs, self.pad_id)
        trainer.model.train()
        self.run.metric(
            {
                "step": trainer.state.step, "tokens": trainer.state.tokens, "held_out_loss": loss,
                "held_out_accuracy": found.value, "held_out_standard_error": found.standard_error,
            }
        )  # fmt: skip
        self.run.log(
            f"step {trainer.state.step}: {found.value:.1%} +- {found.standard_error:.1%} of"
            f" {found.pairs} held-out pairs right, loss {loss:.3f}"
        )

    def on_end(self, trainer: Trainer) -> None:
        """Once more when all pairs were seen, and the plot."""
        super().on_end(trainer)
        if trainer.finished:
            draw(self.run.path)


def draw(run: Path) -> None:
    """``plots/accuracy.png``: accuracy over the run, held-out with its standard error."""
    lines = read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "accuracy" in line]
    checks = [line for line in lines if "held_out_accuracy" in line]

    def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(column(steps, "step"), column(steps, "accuracy"), ".", alpha=0.3, label="a step's own pairs")
    axis.errorbar(
        column(checks, "step"),
        column(checks, "held_out_accuracy"),
        column(checks, "held_out_standard_error"),
        marker="o",
        capsize=3,
        label="held-out pairs",
    )
    axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axis.set(xlabel="step", ylabel="pairs right", ylim=(0.4, 1.02))
    axis.legend(frameon=False)
    figure.savefig(run / "plots/accuracy.png")


def reward(recipe: RewardRecipe, resume_from: str | None = None) -> Path | None:
    """Train by ``recipe``; returns the run folder, None when a signal stopped the run before its end.

    ``resume_from``: see :func:`dsv3.train.stage.open_run`. Raises :class:`UserError` for bad input before
    anything is written, :class:`TrainingFailed` if the run cannot go on.
    """
    device = choose_device(recipe.device)
    if recipe.start is None:
        raise UserError("start is required: the Hugging Face folder to begin from")
    tokenizer = Tokenizer.load(recipe.start)
    check_vocabulary(recipe.model, tokenizer.vocab_size)
    check_start(recipe)
    rows = read_rows(recipe.data.train)
    pairs = encode_pairs(tokenizer, rows, recipe.sequence_length)
    train, held_out = (
        [pair for pair in pairs if is_held_out(pair.group, recipe.data.held_out) is kept]
        for kept in (False, True)
    )
    if not train or not held_out:
        raise UserError(
            f"data.held_out ({recipe.data.held_out:g}) of {len(rows)} pairs, {len(pairs)} of them within"
            f" sequence_length ({recipe.sequence_length}), leaves {len(train)} to train on and"
            f" {len(held_out)} held out; change these, or give more pairs"
        )
    files = tokenizer_files(Path(recipe.start))

    run, checkpoint = open_run(recipe, resume_from)
    run.log(f"{len(train)} pairs to train on, {len(held_out)} held out, of other prompts")
    if len(pairs) < len(rows):
        left = len(rows) - len(pairs)
        run.log(f"{left} pairs of more than {recipe.sequence_length} tokens are left out")
    model = add_score(make_model(recipe, device), recipe.seed)
    objective = BradleyTerry(train, recipe.epochs, recipe.seed, tokenizer.pad_id)
    check = HeldOutPairs(run, held_out, tokenizer.pad_id, recipe.validation.every)
    return train_stage(recipe, model, objective, run, checkpoint, files, [check])
