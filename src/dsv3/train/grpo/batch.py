"""A batch of rollouts, ready to train on: what a checkpoint keeps of it too.

Shapes: S answers, X tokens of prompt and answer (padded), T tokens an answer (padded), L layers with experts,
K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

PREFIX = "rollouts/"


@dataclass(frozen=True)
class Batch:
    """``tokens_SX``, ``prompt_S`` (tokens of the prompt), ``length_S`` (prompt and answer): int64.

    ``advantages_S`` FP32. ``sampled_ST``: log-probabilities at temperature 1 as the engine gave them.
    ``old_ST``, ``reference_ST``: at the temperature of sampling, under the policy before the first step on
    this batch and under the reference; None where they are not needed. ``routes_STLK``: int16
    ``[S, X - 1, L, K]``, None without replay.
    """

    tokens_SX: Tensor
    prompt_S: Tensor
    length_S: Tensor
    advantages_S: Tensor
    sampled_ST: Tensor
    old_ST: Tensor | None = None
    reference_ST: Tensor | None = None
    routes_STLK: Tensor | None = None

    def pick(self, rows: Tensor) -> Batch:
        """Some of the answers, cut to the longest of them."""
        length, answers = self.length_S[rows], (self.length_S - self.prompt_S)[rows]
        widths = {"SX": int(length.max()), "ST": int(answers.max()), "STLK": int(length.max()) - 1}
        picked = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                value = value[rows]
                width = widths.get(entry.name.rpartition("_")[2])
                picked[entry.name] = value if width is None else value[:, :width]
        return replace(self, **picked)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        kept = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in kept.items() if value is not None})

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        kept = {PREFIX + entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in kept.items() if value is not None}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Batch | None:
        """What :meth:`tensors` gave; None if there was no batch."""
        if PREFIX + "tokens_SX" not in tensors:
            return None
        return cls(**{entry.name: tensors.get(PREFIX + entry.name) for entry in fields(cls)})  # type: ignore[arg-type]
