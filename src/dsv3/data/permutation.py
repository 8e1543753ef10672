"""Shuffles without a table (a Feistel network over [0, n)), and the period table that mixes sources."""

from __future__ import annotations

from fractions import Fraction
from math import gcd, lcm

import numpy as np

ROUNDS = 6
EXACT_PERIOD = 100_000  # weights with a common denominator up to this are met exactly


def mix(x: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of splitmix64, elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def combine(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 key (array) from several integers (or arrays that broadcast together)."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        part = np.atleast_1d(np.asarray(part, dtype=np.uint64))
        key = mix(key ^ mix(part + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(0x9E3779B97F4A7C15))
    return key


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Send each of ``index`` (integers in [0, size)) to its place in the shuffle that its ``key`` names.

    For a fixed key this is a bijection of [0, size). O(1) an element: a balanced Feistel network over the
    next power of four, repeated on values that fall outside (fewer than 4 times on average).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = index.astype(np.uint64)
    key = np.broadcast_to(key.astype(np.uint64), out.shape)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right, k = out[outside] >> half, out[outside] & mask, key[outside]
        for number in range(ROUNDS):
            left, right = right, left ^ (mix(right ^ combine(k, number)) & mask)
        out[outside] = (left << half) | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def period_table(weights: list[float], seed: int) -> np.ndarray:
    """int64 [period]: the source of each place of a period, seeded order, the weights' proportions.

    Weights are read as the decimals they were written as. With a common denominator up to 100,000 the
    proportions are exact; otherwise the period is 100,000 and a source is off by less than one of those.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(f * lcm(*(g.denominator for g in exact))) for f in exact]
    period = Fraction(sum(whole), gcd(*whole))
    if period > EXACT_PERIOD:
        period = Fraction(EXACT_PERIOD)
    elif period < 1000:
        period *= 1000 // period  # a longer period hides the repetition
    shares = [f / sum(exact) * period for f in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: int(period) - sum(counts)]:
        counts[i] += 1
    table = np.repeat(np.arange(len(weights)), counts)
    places = permute(np.arange(len(table)), len(table), combine(seed, 0x7AB1E))
    return table[places]
