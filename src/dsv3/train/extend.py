"""``dsv3 extend``: the context extension, phase by phase (report 4.3).

YaRN changes the rotations of the decoupled key and its query part and the softmax's scale, both fields of the
model's ``config.json``; what is left to do is to train on, at one length after the other.
"""

from __future__ import annotations

from pathlib import Path

from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.extend import ExtendRecipe, Phase
from dsv3.train.pretrain import loaders, pretrain
from dsv3.train.stage import check_start


def extend(recipe: ExtendRecipe, resume: bool = False) -> Path | None:
    """Run the phases, each from the model the one before wrote; returns the last one's run folder.

    None when a signal stopped a phase. With ``resume``, finished phases are skipped and an unfinished one
    goes on from its newest checkpoint. Raises :class:`UserError` for bad input in any phase before the first
    begins, :class:`dsv3.train.trainer.TrainingFailed` if one cannot go on.
    """
    for phase in recipe.phases:
        loaders(phase)
    first = recipe.phases[0]
    check_start(first)
    used = [phase.out for phase in recipe.phases if (Path(phase.out) / "recipe.yaml").exists()]
    if used and not resume:
        raise UserError(f"out ({used[0]}) already holds a run: go on with --resume auto, or choose another")
    for phase in recipe.phases:
        if not _is_finished(phase) and pretrain(phase, "auto" if resume else None) is None:
            return None
    return Path(recipe.phases[-1].out)


def _is_finished(phase: Phase) -> bool:
    """Whether this very phase has run to its end: its recipe is there and so is what it writes last."""
    out = Path(phase.out)
    if not (out / ("model-ema" if phase.ema.decay else "model")).is_dir():
        return False
    return recipes.load(Phase, out / "recipe.yaml") == phase
