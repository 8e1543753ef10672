"""What decides a document's fate: its identity (duplicates, the held-out split) and 13-gram overlap."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.common.errors import UserError

GRAM = 13  # words, as in GPT-3's and most later reports' decontamination
# A word: letters and digits; a Chinese or Japanese character is a word of its own, for want of spaces.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
_PRIME = 0x9E3779B97F4A7C15


def normalised(text: str) -> str:
    """The text in NFC with every run of white space made one space: what "exact duplicate" means."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def identity(text: str) -> bytes:
    """16 bytes that are equal for two documents exactly when their normalised text is."""
    return hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()


def order(identity: bytes, seed: int) -> int:
    """A 64-bit number: where a document stands in the order shuffled by ``seed``."""
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8, key=f"order {seed}".encode()).digest())


def held_out(identity: bytes, valid_fraction: float) -> bool:
    """Whether a document belongs to the held-out split: depends on its text and the fraction alone."""
    return int.from_bytes(identity[:8]) < valid_fraction * 2.0**64


def words(text: str) -> list[str]:
    """Lower-case words, punctuation dropped."""
    return _WORD.findall(text.lower())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def evaluation_texts(path: str) -> Iterator[str]:
    """Every text of an evaluation file: all strings of each row of jsonl(.gz), else the whole file."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if path.endswith((".jsonl", ".jsonl.gz")):
                for line in file:
                    if line.strip():
                        yield from _strings(json.loads(line))
            else:
                yield file.read()
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"decontaminate: {path} cannot be read: {error}") from None


class Decontaminator:
    """Finds documents that share 13 words in a row with any of the evaluation texts."""

    def __init__(self, paths: tuple[str, ...]):
        self.vocabulary: dict[str, int] = {}
        grams: set[tuple[int, ...]] = set()
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"decontaminate: {path} does not exist")
            for text in evaluation_texts(path):
                numbers = [self.vocabulary.setdefault(w, len(self.vocabulary) + 1) for w in words(text)]
                grams.update(zip(*(numbers[place:] for place in range(GRAM))))
        self.grams = grams
        rows = np.array(sorted(grams), dtype=np.uint64).reshape(-1, GRAM)
        self._hashes = np.unique(self._hash([rows[:, place] for place in range(GRAM)]))

    @staticmethod
    def _hash(columns: list[np.ndarray]) -> np.ndarray:
        total = np.zeros_like(columns[0])
        for column in columns:
            total = total * np.uint64(_PRIME) + column
        return total

    def contaminated(self, text: str) -> bool:
        """Whether ``text`` holds one of the 13-grams."""
        # Words no evaluation text has are 0 and can be in no match; hashes only shortlist, tuples decide.
        found = [self.vocabulary.get(word, 0) for word in words(text)]
        if len(found) < GRAM or not len(self._hashes):
            return False
        numbers = np.array(found, dtype=np.uint64)
        size = len(numbers) - GRAM + 1
        hashes = self._hash([numbers[place : place + size] for place in range(GRAM)])
        at = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[at] == hashes)
        return any(tuple(found[hit : hit + GRAM]) in self.grams for hit in hits.tolist())


@lru_cache(maxsize=1)
def decontaminator(paths: tuple[str, ...]) -> Decontaminator | None:
    """The decontaminator of these files, built once a process; None without files."""
    return Decontaminator(paths) if paths else None
