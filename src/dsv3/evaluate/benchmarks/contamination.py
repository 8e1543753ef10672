"""Questions that prepared training data already holds: any 13 words in a row of a question or its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsv3.common.progress import Progress
from dsv3.data.filters import GRAM, words
from dsv3.data.shards import TokenShards, open_split
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluate.benchmarks.base import Benchmark

WORDS = GRAM
Gram = tuple[str, ...]


def overlap(prepared: Path, benchmarks: Sequence[Benchmark]) -> dict[str, dict[str, Any]]:
    """For each benchmark: ``questions``, those long enough to be looked for (``searched``), those ``found``,
    their ``share`` of the searched ones, and their ``ids``.

    ``prepared``: a folder of ``dsv3 data prepare``, whose training split is read. Examples in a prompt do not
    count, a question's own words do. Raises :class:`UserError` where there is no such folder.
    """
    splits = open_split(prepared, "train")
    tokenizer = Tokenizer.load(prepared)
    wanted: dict[Gram, set[tuple[str, str]]] = {}
    searched = {task.name: 0 for task in benchmarks}
    for task in benchmarks:
        for question in task.questions:
            grams = _grams(question.own)
            searched[task.name] += bool(grams)
            for gram in grams:
                wanted.setdefault(gram, set()).add((task.name, question.id))
    first_words = {gram[0] for gram in wanted}
    hits: set[tuple[str, str]] = set()
    with Progress("contamination", sum(len(shards) for _, shards, _ in splits), "tok") as progress:
        for _, shards, _ in splits:
            for ids in _documents(shards):
                found = words(tokenizer.decode(ids, skip_special=True))
                for place in range(len(found) - GRAM + 1):
                    if found[place] in first_words:
                        hits |= wanted.get(tuple(found[place : place + GRAM]), set())
                progress.advance(len(ids))
    report = {}
    for task in benchmarks:
        own = [question.id for question in task.questions if (task.name, question.id) in hits]
        report[task.name] = {
            "questions": len(task.questions), "searched": searched[task.name], "found": len(own),
            "share": len(own) / max(1, searched[task.name]), "ids": own,
        }  # fmt: skip
    return report


def _grams(text: str) -> set[Gram]:
    found = words(text)
    return set(zip(*(found[place:] for place in range(GRAM))))


def _documents(shards: TokenShards) -> Iterator[list[int]]:
    for start, stop in pairwise([*shards.document_starts.tolist(), len(shards)]):
        yield shards.tokens(start, stop).tolist()
