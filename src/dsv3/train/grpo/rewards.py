"""The recipe's reward functions: rules by name, models from folders, a user's from a file of Python."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from dsv3.common.errors import UserError, nearest
from dsv3.config.distill import ExpertSection
from dsv3.config.grpo import GRPORecipe, RewardSection
from dsv3.evaluate.judge import Judge
from dsv3.evaluate.reward_model import RewardModel
from dsv3.evaluate.rewards import (
    RewardFunction,
    Rewards,
    boxed_reward,
    format_reward,
    from_verl,
    soft_overlong,
    task_reward,
)


def resolve(recipe: GRPORecipe, device: torch.device) -> Rewards:
    """The functions with their weights, as one. Raises :class:`UserError` for one that cannot be found.

    ``overlong`` is DAPO's penalty over the last quarter of ``rollouts.max_tokens``. Models are loaded
    here, to ``device``.
    """
    longest = recipe.rollouts.max_tokens
    known: dict[str, RewardFunction] = {
        "task": task_reward,
        "boxed": boxed_reward,
        "format": format_reward,
        "overlong": soft_overlong(longest, max(1, longest // 4)),
    }
    functions: dict[str, RewardFunction] = {}
    for section in recipe.rewards:
        function = _find(section, known, device)
        name = section.function
        if name not in known:
            name = getattr(function, "__name__", type(function).__name__)
        if name in functions:
            raise UserError(f"rewards name {name} twice; give each function once")
        functions[name] = function
    return Rewards(functions, [section.weight for section in recipe.rewards], recipe.on_crash)


def _find(section: RewardSection, known: dict[str, RewardFunction], device: torch.device) -> RewardFunction:
    kind, _, folder = section.function.partition(":")
    if kind in ("model", "judge"):
        if not Path(folder).is_dir():
            raise UserError(f"rewards.function ({section.function}): {folder or 'no'} folder does not exist")
        if kind == "model":
            return RewardModel(folder, device=device)
        return Judge.open(ExpertSection(kind="engine", model=folder))
    path, colon, name = section.function.rpartition(":")
    if not colon:
        if name not in known:
            raise UserError(
                f"rewards.function ({name}) is unknown{nearest(name, known)}; there are {', '.join(known)},"
                " model:FOLDER, judge:FOLDER, and functions of your own as FILE.py:NAME"
            )
        return known[name]
    if not Path(path).is_file():
        raise UserError(f"rewards.function ({section.function}): {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"rewards_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"rewards.function ({section.function}): {path} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code: anything
        raise UserError(f"rewards.function ({section.function}): {type(error).__name__}: {error}") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"rewards.function ({section.function}): {path} has no function {name}")
    return from_verl(function) if section.style == "verl" else function
