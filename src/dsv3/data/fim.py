"""Fill-in-the-middle (report 4.1): a document becomes prefix, suffix, middle, with the released tokens.

``<｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>middle`` and the end-of-sentence token (PSM order):
cut at two random characters of the document, before it is packed.
"""

from __future__ import annotations

import numpy as np

from dsv3.data.tokenizer import Tokenizer


def split(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Cut ``text`` at two uniformly random places: (prefix, middle, suffix), together ``text``."""
    first, second = sorted(int(place) for place in rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[first:second], text[second:]


def join(tokenizer: Tokenizer, prefix: list[int], middle: list[int], suffix: list[int]) -> list[int]:
    """The PSM token sequence of three encoded pieces, end of sentence not included."""
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    return [begin, *prefix, hole, *suffix, end, *middle]


def take_apart(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The reverse of :func:`join`: (prefix, middle, suffix). ValueError if ``ids`` is not PSM."""
    if not ids or ids[0] != tokenizer.fim_begin_id:
        raise ValueError("not a fill-in-the-middle document: it does not begin with the fim_begin token")
    hole, end = ids.index(tokenizer.fim_hole_id), ids.index(tokenizer.fim_end_id)
    return ids[1:hole], ids[end + 1 :], ids[hole + 1 : end]
