"""``dsv3 grpo``: puts a recipe's parts together and trains."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3.checkpoint.hf import tokenizer_files
from dsv3.common.errors import UserError
from dsv3.config.grpo import GRPORecipe
from dsv3.config.train import check_vocabulary
from dsv3.data.tokenizer import Tokenizer
from dsv3.parallel.world import World, enter, local_device
from dsv3.train.callbacks.plots import Plots
from dsv3.train.grpo.completions import Completions
from dsv3.train.grpo.evaluation import HeldOutTasks
from dsv3.train.grpo.objective import GRPO
from dsv3.train.grpo.plots import draw
from dsv3.train.grpo.prompts import Prompts
from dsv3.train.grpo.rewards import resolve
from dsv3.train.grpo.rollouts import Rollouts
from dsv3.train.schedules import Extent
from dsv3.train.stage import check_shares, check_start, choose_device, make_model, open_run, train_stage
from dsv3.train.trainer import Callback


def grpo(recipe: GRPORecipe, resume_from: str | None = None) -> Path | None:
    """Train by ``recipe``; returns the run folder, None when a signal stopped the run before its end.

    ``resume_from``: see :func:`dsv3.train.stage.open_run`. Raises :class:`UserError` for bad input before
    anything is written, :class:`Failure` when a reward function crashes or the run cannot go on.
    """
    device = local_device(choose_device(recipe.device))
    tokenizer = Tokenizer.load(recipe.start)
    check_vocabulary(recipe.model, tokenizer.vocab_size)
    options = recipe.rollouts
    prompts = Prompts(recipe, tokenizer, recipe.sequence_length - options.max_tokens)
    rewards = resolve(recipe, device)
    check_verifiers(recipe, prompts)
    check_start(recipe)
    world = enter_data_ranks(recipe, device)

    run, checkpoint = open_run(recipe, resume_from, world)
    model = make_model(recipe, device, world)
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
    if world.is_first:
        callbacks.append(Plots(run, draw))
    files = tokenizer_files(recipe.start)
    return train_stage(recipe, model, objective, run, checkpoint, files, callbacks, world)


def check_verifiers(recipe: GRPORecipe, prompts: Prompts) -> None:
    """Refuse the reward ``task`` where no prompt belongs to a task: it would judge nothing, in silence."""
    named = any(section.function == "task" for section in recipe.rewards)
    if named and not recipe.tasks and not any(row.fields.get("task") for row in prompts.rows):
        raise UserError(
            "rewards.function (task): no prompt belongs to a task with a verifier; fill tasks, or name boxed"
            " or a function of your own (FILE.py:NAME)"
        )


def enter_data_ranks(recipe: GRPORecipe, device: torch.device) -> World:
    """The processes of a run, each with the whole model: the engine that samples is one process's.

    Raises :class:`UserError` for other layouts and for batches that ranks cannot share.
    """
    section = recipe.parallel
    cut = {"pipeline": section.pipeline, "expert": section.expert, "context": section.context}
    for name, ranks in cut.items():
        if ranks > 1:
            raise UserError(f"parallel.{name} ({ranks}): dsv3 grpo samples from whole models; leave it at 1")
    if section.zero == 3:
        raise UserError("parallel.zero (3): dsv3 grpo samples from whole models; use --parallel.zero 1")
    world = enter(section, recipe.model, device)
    check_shares(recipe, Extent("samples", recipe.steps * recipe.batch.sequences, 1), world)
    return world
