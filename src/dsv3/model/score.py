"""A scalar head: what a reward model says of a text, read from the state of its last token (report 5.2).

It is one more matrix beside the model, ``score.weight [1, D]``, under the name transformers gives it: such a
folder opens as ``DeepseekV3ForSequenceClassification`` there.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.model.deepseek_v3 import DeepSeekV3
from dsv3.model.linear import Linear
from dsv3.model.moe import RouterStats

NAME = "score.weight"
CONFIG = {
    "architectures": ["DeepseekV3ForSequenceClassification"],
    "id2label": {"0": "reward"},
    "label2id": {"reward": 0},
}


def add_score(model: DeepSeekV3, seed: int = 0) -> DeepSeekV3:
    """Give ``model`` a scalar head, drawn from N(0, 1 / (D + 1)), on the device of its output head."""
    width = model.config.hidden_size
    model.score = Linear(width, 1).to(model.lm_head.weight.device)
    if not model.score.weight.is_meta:
        drawn = torch.empty(1, width).normal_(
            0, (width + 1) ** -0.5, generator=torch.Generator().manual_seed(seed)
        )
        model.score.weight.data.copy_(drawn)
    model.config = model.config.model_copy(update={"extra": {**model.config.extra, **CONFIG}})
    return model


def scores(model: DeepSeekV3, ids_BT: Tensor, last_B: Tensor) -> tuple[Tensor, dict[int, RouterStats]]:
    """The scalar of each row, FP32 ``[B]``, at its token ``last_B``; and routing statistics.

    What follows that token (padding) has no part in it. The MTP modules are left out.
    """
    states, router = model.hidden_states(ids_BT, mtp=False)
    rows = torch.arange(len(ids_BT), device=ids_BT.device)
    return model.get_submodule("score")(states[0][rows, last_B].float())[:, 0], router
