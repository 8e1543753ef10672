"""A trained scalar reward model, used: scores of texts, accuracy on pairs, a reward function for GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3.checkpoint.hf import load
from dsv3.common.errors import UserError
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluate.preferences import Accuracy, Pair, accuracy, encode_conversations, padded
from dsv3.model import DeepSeekV3
from dsv3.model.score import scores

BATCH = 16  # conversations a pass


@torch.no_grad()
def score_tokens(model: DeepSeekV3, conversations: Sequence[Sequence[int]], pad_id: int) -> list[float]:
    """The scalar of each conversation, those of like length together."""
    order = sorted(range(len(conversations)), key=lambda at: len(conversations[at]))
    found = [0.0] * len(order)
    device = model.lm_head.weight.device
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        ids_BT, last_B = padded([conversations[at] for at in places], pad_id)
        values, _ = scores(model, ids_BT.to(device), last_B.to(device))
        for at, value in zip(places, values.tolist()):
            found[at] = value
    return found


def pair_accuracy(model: DeepSeekV3, pairs: Sequence[Pair], pad_id: int) -> tuple[Accuracy, float]:
    """How often the chosen one scores higher, and the mean loss, -log sigmoid of the difference."""
    values = score_tokens(model, [*(p.chosen for p in pairs), *(p.rejected for p in pairs)], pad_id)
    chosen, rejected = values[: len(pairs)], values[len(pairs) :]
    margins = torch.tensor(chosen) - torch.tensor(rejected)
    loss = float(-torch.nn.functional.logsigmoid(margins).mean())
    return accuracy(chosen, rejected, [pair.group for pair in pairs]), loss


class RewardModel:
    """A reward model's folder as a reward function with TRL's signature.

    ``model``: what ``dsv3 reward`` exported, or such a model with its ``tokenizer``. Calling it gives one
    float a completion, None for one that is too long for the model.
    """

    __name__ = "reward_model"  # what the metrics call it

    def __init__(
        self,
        model: str | Path | DeepSeekV3,
        tokenizer: Tokenizer | None = None,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(model, DeepSeekV3):
            tokenizer = tokenizer or Tokenizer.load(model)
            model = load(model, device=device)
        if not hasattr(model, "score"):
            raise UserError("the model has no scalar head (score.weight); `dsv3 reward` trains one")
        if tokenizer is None:
            raise UserError("a reward model needs its tokenizer: pass tokenizer=...")
        self.model, self.tokenizer = model.eval(), tokenizer

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Score each completion (a text, or messages) to its prompt (the same)."""
        conversations = encode_conversations(
            self.tokenizer, [(p, c, "") for p, c in zip(prompts, completions)]
        )
        longest = self.model.config.max_position_embeddings
        fitting = [tokens for tokens in conversations if len(tokens) <= longest]
        values = iter(score_tokens(self.model, fitting, self.tokenizer.pad_id))
        return [next(values) if len(tokens) <= longest else None for tokens in conversations]
