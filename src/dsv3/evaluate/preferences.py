"""Pairs of a better and a worse answer: read, tokenised, split; and how often a judge prefers the better one.

Shapes: B batch, T time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.common.errors import UserError
from dsv3.data import examples, rows
from dsv3.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """Tokens of two whole conversations. ``group``: hash of what was asked."""

    chosen: list[int]
    rejected: list[int]
    group: str


def read_rows(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with ``chosen`` and ``rejected``, and ``prompt`` unless both hold whole conversations, as in TRL.

    Raises :class:`UserError` naming the line for what is missing.
    """
    found = []
    for row in rows.read(paths):
        fields = dict(row.fields)
        for name in ("chosen", "rejected"):
            if fields.get(name) is None:
                raise UserError(f"{row.where}: {name} is missing; a row needs prompt, chosen and rejected")
        if fields.get("prompt") is None:
            if isinstance(fields["chosen"], str) or len(fields["chosen"]) < 2:
                raise UserError(f"{row.where}: prompt is missing")
            cut = next(
                (at for at, (a, b) in enumerate(zip(fields["chosen"], fields["rejected"])) if a != b),
                len(fields["chosen"]) - 1,
            )
            fields["prompt"] = list(fields["chosen"][:cut])
            fields["chosen"], fields["rejected"] = fields["chosen"][cut:], fields["rejected"][cut:]
        found.append({**fields, "where": row.where})
    if not found:
        raise UserError(f"{', '.join(paths)} hold no pairs")
    return found


def group_of(prompt: Any) -> str:
    """Hash of a prompt: pairs of one prompt have the same."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def is_held_out(group: str, share: float) -> bool:
    """Whether a prompt is among those held out: decided by its hash, for any order and size of the data."""
    return int(group, 16) < share * 16**16


def encode_conversations(tokenizer: Tokenizer, found: Sequence[tuple[Any, Any, str]]) -> list[list[int]]:
    """Tokens of (prompt, answer, where it stands), reasoning kept, each text or messages."""
    pieces = []
    for prompt, answer, where in found:
        try:
            pieces.append(examples.pieces({"prompt": prompt, "completion": answer}))
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from None
    return [ids for ids, _ in examples.encode(tokenizer, pieces)]


def encode_pairs(tokenizer: Tokenizer, found: Sequence[dict[str, Any]], longest: int) -> list[Pair]:
    """The rows as tokens; a pair with a conversation of more than ``longest`` tokens is left out."""
    chosen, rejected = (
        encode_conversations(tokenizer, [(row["prompt"], row[name], row["where"]) for row in found])
        for name in ("chosen", "rejected")
    )
    pairs = [Pair(good, bad, group_of(row["prompt"])) for row, good, bad in zip(found, chosen, rejected)]
    return [pair for pair in pairs if max(len(pair.chosen), len(pair.rejected)) <= longest]


def padded(conversations: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows filled up on the right, ``ids_BT``, and the place of each one's last token, ``last_B``."""
    longest = max(map(len, conversations))
    ids_BT = torch.full((len(conversations), longest), pad_id, dtype=torch.int64)
    for row, tokens in enumerate(conversations):
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
    return ids_BT, torch.tensor([len(tokens) - 1 for tokens in conversations])


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose better answer scores higher; a tie, or a pair without scores, counts a half.

    ``standard_error`` takes a prompt's pairs as one draw. ``decided``: pairs that were no tie.
    """

    value: float
    standard_error: float
    pairs: int
    decided: int


def accuracy(
    chosen: Sequence[float | None], rejected: Sequence[float | None], groups: Sequence[str]
) -> Accuracy:
    """How often ``chosen`` scores above ``rejected``, with the standard error clustered by ``groups``."""
    if not chosen:
        raise UserError("there are no pairs to measure accuracy on")
    right = [0.5 if a is None or b is None or a == b else float(a > b) for a, b in zip(chosen, rejected)]
    mean = sum(right) / len(right)
    clusters: dict[str, float] = defaultdict(float)
    for value, group in zip(right, groups):
        clusters[group] += value - mean
    error = math.sqrt(sum(total**2 for total in clusters.values())) / len(right)
    return Accuracy(mean, error, len(right), sum(value != 0.5 for value in right))
