"""Encoding many texts two to three times faster than the library, to the same ids, by remembering pieces.

Merges never cross the pieces that the pre-tokenizer makes, so a text may be cut wherever a piece is sure to
begin, and every distinct cut-out is encoded once. Such places, for DeepSeek's pre-tokenizer (tokenizer.py):

* before a space that a Latin letter follows: a run of white space leaves its last space to the word;
* after the last line break of a run of white space: every alternative that takes line breaks ends there;
* before punctuation that follows a Latin letter or a digit: pieces of letters and of digits end there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

import tokenizers

_CUT = re.compile(
    r"(?s).+?(?=\Z| [A-Za-z]|(?<=\n)[ \t]*[!-~]|(?<=[A-Za-z0-9])[!-/:-@\[-`{-~])"
)  # fmt: skip
REMEMBERED = 500_000  # pieces, about 100 MB; beyond it the memory starts afresh


class PretokenEncoder:
    """Encodes texts with a tokenizer that has DeepSeek's pre-tokenizer, no normalizer and no added tokens."""

    def __init__(self, plain: tokenizers.Tokenizer):
        self.plain = plain
        self._ids: dict[str, list[int]] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, the same as ``plain.encode`` gives."""
        cut = [_CUT.findall(text) for text in texts]
        wanted = set().union(*cut)
        if len(self._ids) + len(wanted) > REMEMBERED:
            self._ids.clear()
        missing = list(wanted - self._ids.keys())
        for piece, encoding in zip(missing, self.plain.encode_batch_fast(missing, add_special_tokens=False)):
            self._ids[piece] = encoding.ids
        ids_of = self._ids.__getitem__
        return [list(chain.from_iterable(map(ids_of, pieces))) for pieces in cut]
