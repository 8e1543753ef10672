"""Rejection sampling (report 5.1): which of an expert's answers become training data, and why others do not.

Each filter is a pure function of texts; :func:`judge` asks them in order, and the first that objects names
the reason. :func:`select` then keeps the concise ones of what is left.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from dsv3.config.distill import RejectionSection
from dsv3.data.special import END_THINK, THINK

ERROR = "error"  # the expert gave no answer
UNFINISHED = "unfinished"
MALFORMED = "malformed"
WRONG = "wrong"
MIXED = "mixed language"
LOOPS = "repetition"
TWICE = "duplicate"
LONGER = "longer than kept"  # right, but a shorter one was kept
REASONS = (ERROR, UNFINISHED, MALFORMED, WRONG, MIXED, LOOPS, TWICE, LONGER)

NGRAM = 8  # words
LINES = 4  # equal lines in a row are a loop


def malformed(text: str) -> bool:
    """Empty, or thought tags that are not ``<think>`` thoughts ``</think>`` answer, each once, nothing empty.

    Text without any tag is a plain answer and fine.
    """
    if THINK not in text and END_THINK not in text:
        return not text.strip()
    if text.count(THINK) != 1 or text.count(END_THINK) != 1:
        return True
    before, _, rest = text.partition(THINK)
    thoughts, _, answer = rest.partition(END_THINK)
    return bool(before.strip()) or not thoughts.strip() or not answer.strip()


@lru_cache(maxsize=4096)
def script(letter: str) -> str:
    """Writing system of a letter: ``LATIN``, ``CYRILLIC``, ...; Chinese and Japanese are both ``CJK``."""
    name = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "BOPOMOFO") else name


def scripts(text: str) -> dict[str, int]:
    """Words of each script. Chinese has no spaces: each of its letters is a word.

    A lone letter of any other script is none (mathematics is full of them), nor is a digit or a sign.
    """
    found: dict[str, int] = {}
    for word in re.findall(r"[^\W\d_]+", text):
        kinds = [script(letter) for letter in word]
        ideographs = kinds.count("CJK")
        if ideographs:
            found["CJK"] = found.get("CJK", 0) + ideographs
        for kind in {kind for kind in kinds if kind != "CJK" and kinds.count(kind) > 1}:
            found[kind] = found.get(kind, 0) + 1
    return found


def foreign_share(text: str, prompt: str) -> float:
    """Share of the words that are in a script neither the prompt nor the answer's own majority uses.

    A prompt without words (a bare formula) leaves the choice of the language to the answer.
    """
    written, asked = scripts(text), scripts(prompt)
    if not written:
        return 0.0
    known = set(asked) or {max(written, key=lambda kind: written[kind])}
    return sum(count for kind, count in written.items() if kind not in known) / sum(written.values())


def repeated_share(text: str) -> float:
    """Share of the runs of 8 words that stood earlier in the text; 1 where a line comes 4 times in a row."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(len(set(lines[at : at + LINES])) == 1 for at in range(len(lines) - LINES + 1)):
        return 1.0
    words = text.split()
    runs = [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def judge(
    text: str, prompt: str, finish_reason: str, score: float | None, options: RejectionSection
) -> str | None:
    """Why an answer is dropped; None for one that may be kept. ``score`` None: nothing could judge it."""
    if finish_reason == "error":
        return ERROR
    if finish_reason != "stop":
        return UNFINISHED
    if malformed(text):
        return MALFORMED
    if score is None or score < options.least_score:
        return WRONG
    if foreign_share(text, prompt) > options.foreign:
        return MIXED
    return LOOPS if repeated_share(text) > options.repeated else None


def select(texts: Sequence[str], reasons: Sequence[str | None], keep: int) -> list[str | None]:
    """The reasons of one prompt's answers once the ``keep`` shortest different ones are chosen (None).

    Length is in characters; of equally short answers the first is taken.
    """
    chosen: list[str | None] = list(reasons)
    kept: set[str] = set()
    for at in sorted(
        (at for at, reason in enumerate(reasons) if reason is None), key=lambda i: len(texts[i])
    ):
        text = texts[at].strip()
        if text in kept:
            chosen[at] = TWICE
        elif len(kept) == keep:
            chosen[at] = LONGER
        else:
            kept.add(text)
    return chosen
