"""Bits per byte and MTP acceptance on held-out text (report 2.2 for the latter).

Shapes: B batch, T time, N flattened tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import lzma
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.data.loader import Batch
from dsv3.data.targets import labels, restarted_positions
from dsv3.model import DeepSeekV3
from dsv3.ops.cross_entropy import CHUNK_ELEMENTS, IGNORE


@dataclass(frozen=True)
class HeldOut:
    """``loss``: nats a token. ``bits_per_byte``: bits a UTF-8 byte of the text the tokens stand for.

    ``acceptance``: share of positions, for each MTP depth, where the draft is the token the main model
    itself would choose greedily there.
    """

    loss: float
    bits_per_byte: float
    acceptance: list[float]


@torch.no_grad()
def evaluate(model: DeepSeekV3, rows: Batch, byte_lengths_V: Tensor, length: int, batch: int = 8) -> HeldOut:
    """Read rows of ``length + 1`` tokens or more; each predicts its tokens 1 .. length.

    Where the rows hold documents or say which tokens bear loss, those that do not count nowhere (such rows
    hold the tokens of every MTP depth too). ``byte_lengths_V``: UTF-8 bytes a token stands for (0 for
    special tokens).
    """
    device = model.lm_head.weight.device
    nats, tokens, size = 0.0, 0, 0
    agreed = [0] * len(model.mtp_modules)
    drafted = [0] * len(model.mtp_modules)
    for start in range(0, rows.tokens_BT.shape[0], batch):
        piece = rows.slice(start, start + batch).to(device)
        documents = None if piece.documents_BT is None else piece.documents_BT[:, :length]
        states, _ = model.hidden_states(
            piece.tokens_BT[:, :length],
            positions_BT=None if documents is None else restarted_positions(documents),
            documents_BT=documents,
        )
        target = labels(piece, length, 0)
        nats += _nats(model, states[0].flatten(0, 1), target.flatten())
        bearing = target[target != IGNORE].cpu()
        tokens += bearing.numel()
        size += int(byte_lengths_V[bearing].sum())
        if len(states) > 1:
            greedy = _argmax(model, states[0])
            for depth, state in enumerate(states[1:], start=1):
                draft = _argmax(model, state)  # at i: the token at i + depth + 1
                own = greedy[:, depth : depth + draft.shape[1]]
                counts = labels(piece, length, depth)[:, : own.shape[1]] != IGNORE
                agreed[depth - 1] += int(((draft[:, : own.shape[1]] == own) & counts).sum())
                drafted[depth - 1] += int(counts.sum())
    acceptance = [a / max(1, d) for a, d in zip(agreed, drafted)]
    return HeldOut(nats / max(1, tokens), nats / math.log(2) / max(1, size), acceptance)


def in_bytes(loss: float, rows: Batch, byte_lengths_V: Tensor, length: int) -> HeldOut:
    """The same figures from the mean loss of such rows, which somebody else has read."""
    target = labels(rows, length, 0)
    bearing = target[target != IGNORE]
    bits = loss * bearing.numel() / math.log(2)
    return HeldOut(loss, bits / max(1, int(byte_lengths_V[bearing].sum())), [])


def _nats(model: DeepSeekV3, state_ND: Tensor, labels_N: Tensor) -> float:
    """Sum of the negative log-likelihoods, by chunks, through the head itself: its matrix may be packed."""
    step = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    return sum(
        float(F.cross_entropy(model.lm_head(state).float(), labels, ignore_index=IGNORE, reduction="sum"))
        for state, labels in zip(state_ND.split(step), labels_N.split(step))
    )


def _argmax(model: DeepSeekV3, state_BTD: Tensor) -> Tensor:
    """Likeliest token of each position, one sequence at a time to bound the logits."""
    return torch.stack([model.lm_head(row).argmax(dim=-1) for row in state_BTD])


def unigram_bits_per_byte(fit: bytes, text: bytes) -> float:
    """Baseline: bits a byte of ``text`` under the byte frequencies of ``fit`` (add-one smoothed)."""
    counts = Counter(fit)
    total = len(fit) + 256
    bits = sum(n * -math.log2((counts[byte] + 1) / total) for byte, n in Counter(text).items())
    return bits / max(1, len(text))


def xz_bits_per_byte(text: bytes) -> float:
    """Baseline: bits a byte after ``xz -9``."""
    return 8 * len(lzma.compress(text, preset=9)) / max(1, len(text))


def total_loss(model: DeepSeekV3, ids: Sequence[int], length: int) -> float:
    """Nats of a whole token sequence, read in windows of ``length``; the first token is given."""
    stream = torch.tensor(list(ids), dtype=torch.int64)
    windows = -(-max(0, len(stream) - 1) // length)
    padded = torch.full((windows * length + 1,), IGNORE, dtype=torch.int64)
    padded[: len(stream)] = stream
    nats = 0.0
    with torch.no_grad():
        for index in range(windows):
            piece = padded[index * length : (index + 1) * length + 1]
            states, _ = model.hidden_states(piece[None, :-1].clamp_min(0), mtp=False)
            nats += _nats(model, states[0][0], piece[1:])
    return nats
