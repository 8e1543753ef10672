"""``dsv3 grpo``: puts a recipe's parts together and trains."""

from __future__ import annotations

from pathlib import Path

from dsv3.checkpoint.hf import tokenizer_files
from dsv3.config.grpo import GRPORecipe
from dsv3.config.train import check_vocabulary
from dsv3.data.tokenizer import Tokenizer
from dsv3.train.callbacks.plots import Plots
from dsv3.train.grpo.completions import Completions
from dsv3.train.grpo.evaluation import HeldOutTasks
from dsv3.train.grpo.objective import GRPO
from dsv3.train.grpo.plots import draw
from dsv3.train.grpo.prompts import Prompts
from dsv3.train.grpo.rewards import resolve
from dsv3.train.grpo.rollouts import Rollouts
from dsv3.train.stage import check_start, choose_device, make_model, open_run, train_stage
from dsv3.train.trainer import Callback


def grpo(recipe: GRPORecipe, resume_from: str | None = None) -> Path | None:
    """Train by ``recipe``; returns the run folder, None when a signal stopped the run before its end.

    ``resume_from``: see :func:`dsv3.train.stage.open_run`. Raises :class:`UserError` for bad input before
    anything is written, :class:`Failure` when a reward function crashes or the run cannot go on.
    """
    device = choose_device(recipe.device)
    tokenizer = Tokenizer.load(recipe.start)
    check_vocabulary(recipe.model, tokenizer.vocab_size)
    options = recipe.rollouts
    prompts = Prompts(recipe, tokenizer, recipe.sequence_length - options.max_tokens)
    rewards = resolve(recipe, device)
    check_start(recipe)

    run, checkpoint = open_run(recipe, resume_from)
    model = make_model(recipe, device)
    reference = None
    if recipe.policy.beta:
        reference = make_model(recipe, device).requires_grad_(False).eval()
    rollouts = Rollouts(
        model,
        tokenizer,
        recipe.sequence_length,
        options.max_batch,
        options.draft_tokens,
        options.replay_routing,
    )
    objective = GRPO(recipe, rollouts, prompts, rewards, Completions(run, recipe.shown), reference)
    callbacks: list[Callback] = [objective]
    if recipe.evaluation.examples and recipe.tasks:
        callbacks.append(HeldOutTasks(run, recipe, prompts, rollouts))
    callbacks.append(Plots(run, draw))
    return train_stage(recipe, model, objective, run, checkpoint, tokenizer_files(recipe.start), callbacks)
