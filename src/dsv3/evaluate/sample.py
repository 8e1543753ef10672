"""The plainest generator: the whole text is read again for every new token.

It needs nothing but the model and is what faster engines are tested against; use it for short samples.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from dsv3.data.tokenizer import Tokenizer
from dsv3.model import DeepSeekV3


@torch.no_grad()
def generate(
    model: DeepSeekV3,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    vocab_size: int | None = None,
) -> list[int]:
    """Token ids that follow ``prompt``; ends after ``max_tokens`` or with a token of ``stop`` (included).

    ``temperature`` 0 takes the likeliest token; ``vocab_size`` leaves out the ids past the tokenizer's.
    """
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_tokens):
        states, _ = model.hidden_states(torch.tensor([ids], device=device), mtp=False)
        logits_V = model.lm_head(states[0][0, -1]).float().cpu()[:vocab_size]
        if temperature > 0:
            chosen = int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))
        else:
            chosen = int(logits_V.argmax())
        ids.append(chosen)
        if chosen in stop:
            break
    return ids[len(prompt) :]


def complete(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    prompt: str,
    suffix: str | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Text after ``prompt``; with ``suffix``, text between the two (PSM order, report 4.1)."""
    if suffix is None:
        ids = tokenizer.encode(prompt)
    else:
        ids = [
            tokenizer.fim_begin_id,
            *tokenizer.encode(prompt),
            tokenizer.fim_hole_id,
            *tokenizer.encode(suffix),
            tokenizer.fim_end_id,
        ]
    made = generate(
        model,
        ids or [tokenizer.bos_id],
        max_tokens,
        temperature,
        seed,
        stop={tokenizer.eos_id},
        vocab_size=tokenizer.vocab_size,
    )
    return tokenizer.decode(made, skip_special=True)
