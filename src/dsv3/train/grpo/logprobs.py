"""Log-probabilities of answers under the model in training.

Shapes: S answers, X tokens of prompt and answer (padded), T tokens an answer (padded), N tokens of all
answers, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv3.model import DeepSeekV3

CHUNK_ELEMENTS = 1 << 22  # logits alive at once


@dataclass(frozen=True)
class Scored:
    """FP32 ``[S, T]`` each, 0 where there is no token.

    ``logp_ST``: at the temperature of sampling, with a gradient where gradients are on. Without:
    ``plain_ST`` at temperature 1, ``entropy_ST`` (nats) of the distribution each token was drawn from.
    """

    logp_ST: Tensor
    plain_ST: Tensor
    entropy_ST: Tensor


def answer_mask(prompt_S: Tensor, length_S: Tensor) -> Tensor:
    """Which places of ``[S, T]`` hold a token of the answer; T is the longest answer's length."""
    answers_S = length_S - prompt_S
    return torch.arange(int(answers_S.max()), device=length_S.device) < answers_S[:, None]


def _chunk(
    hidden_ND: Tensor, head: torch.nn.Module, targets_N: Tensor, temperature: float, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    logits_NV = head(hidden_ND)[:, :vocab].float()
    logs_NV = (logits_NV / temperature).log_softmax(dim=-1)
    with torch.no_grad():
        entropy_N = -(logs_NV.exp() * logs_NV).sum(dim=-1)
        plain_NV = logs_NV if temperature == 1 else logits_NV.log_softmax(dim=-1)
        plain_N = plain_NV.gather(1, targets_N[:, None])[:, 0]
    return logs_NV.gather(1, targets_N[:, None])[:, 0], plain_N, entropy_N


def score(
    model: DeepSeekV3, tokens_SX: Tensor, prompt_S: Tensor, length_S: Tensor, temperature: float, vocab: int
) -> Scored:
    """Read whole rows (padded on the right, which causal attention never sees) and score their answers.

    Ids from ``vocab`` on have no probability: the engine never draws them. Logits are made of answers' tokens
    only, and of few at a time: the backward pass makes them again.
    """
    width = tokens_SX.shape[1] - 1
    places = torch.arange(width, device=tokens_SX.device)
    # The state at place i gives the distribution of token i + 1.
    rows_SX = (places >= prompt_S[:, None] - 1) & (places < length_S[:, None] - 1)
    states, _ = model.hidden_states(tokens_SX[:, :-1], mtp=False)
    hidden_ND, targets_N = states[0][rows_SX], tokens_SX[:, 1:][rows_SX]
    rows = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    found = [
        checkpoint(
            _chunk, hidden_ND[first : first + rows], model.lm_head, targets_N[first : first + rows],
            temperature, vocab, use_reentrant=False, preserve_rng_state=False,
        )
        for first in range(0, len(targets_N), rows)
    ]  # fmt: skip
    mask_ST = answer_mask(prompt_S, length_S)

    def spread(parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0].new_zeros(mask_ST.shape).masked_scatter(mask_ST, torch.cat(parts))

    logp, plain, entropy = (spread(parts) for parts in zip(*found))
    return Scored(logp, plain.detach(), entropy.detach())
