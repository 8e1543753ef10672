"""Structured output: which tokens may follow, under a JSON schema or a grammar (the library is llguidance).

A grammar is compiled once and found again by its text. Every answer has a matcher of its own, which follows
its tokens; where logits are adjusted, the tokens that may not follow get -inf. The row of logits after drafts
is masked as the state after them wants it: the matcher goes there and comes back. So drafts are drawn and
verified under the same masks, and everything said of speculation holds as it stands. Where only one text can
follow, only its own tokens may: those the tokenizer would cut it into.

The matcher outlives preemption, for it depends on the tokens alone, and goes with the end of the answer.

Whoever may write a schema may write a hostile one. Sizes are bounded, in the library and in the text, and
each new text is first compiled in a process of its own (:mod:`dsv3.serve.rehearsal`, about a tenth of a
second), which may run out of time, memory or stack in the server's place.

Shapes: R rows of logits, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence as Many
from functools import cached_property
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from dsv3.common.errors import UserError
from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.params import SamplingParams

COMPILED = 32  # grammars kept
SECONDS, MEMORY, PATIENCE = 3, 1 << 30, 60  # of a rehearsal: processor time, address space, waiting
# What may stand between two parts of a document: a space, or a line break and the next line's indentation.
# Of blanks without end a small model may make a whole answer.
BLANKS = r"\x20|\r?\n[\x20\x09]{0,40}"
# A schema's own "x-guidance" would allow what is not JSON; these come last and decide.
JSON_OPTIONS: Any = {
    "item_separator": ",", "key_separator": ":", "whitespace_flexible": True, "whitespace_pattern": BLANKS,
    "coerce_one_of": False, "lenient": False, "json_allowed_escapes": None,
    "json_allow_general_unicode_escapes": False,
}  # fmt: skip
LIMITS: Any = {"max_lexer_states": 10_000, "verbose_errors": False}  # a state takes 1 to 2 kB


class Matcher:
    """Where an answer stands in its grammar."""

    def __init__(self, inner: llguidance.LLMatcher):
        self._inner = inner

    def advance(self, token: int) -> bool:
        """Go on by a token; false if it does not fit or the grammar ran into a limit."""
        return self._inner.try_consume_tokens([token]) == 1 and not self._inner.is_error()

    @property
    def complete(self) -> bool:
        """Whether the document is whole and nothing can follow."""
        return self._inner.is_stopped()

    def fill(self, words_W: np.ndarray, guessed: Many[int]) -> None:
        """Set a bit for each token that may follow ``guessed``; all of them where none may.

        That is after drafts that do not fit (they are refused), after the end (what follows it is dropped)
        and where a limit was met (the token chosen does not fit, and the answer ends in an error).

        ``words_W``: int32, zeros.
        """
        taken = self._inner.try_consume_tokens(list(guessed))
        if taken == len(guessed):
            self._inner.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        self._inner.rollback(taken)
        if not words_W.any():
            words_W.fill(-1)


def forbidden(places: Many[tuple[Matcher, Many[int]]], vocab_size: int) -> Tensor:
    """Tokens that may not come next in each place, a state and the drafts after it: bool ``[R, V]``."""
    words_RW = np.zeros((len(places), -(-vocab_size // 32)), dtype=np.int32)
    for words_W, (matcher, guessed) in zip(words_RW, places):
        matcher.fill(words_W, guessed)
    bits = np.unpackbits(~words_RW.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


class Grammars:
    """The compiled grammars of a tokenizer. Its methods may be called from any thread.

    ``vocab_size``: tokens there are to choose from, the leading ones of the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # of the table; not held while compiling

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        """Half a second for a vocabulary of 129,280: made when it is first wanted."""
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(self.tokenizer, self.vocab_size))
        return llguidance.LLTokenizer(
            wrapped, n_vocab=self.vocab_size, slices=llguidance.LLTokenizer.json_slices()
        )

    def start(self, params: SamplingParams) -> Matcher:
        """A matcher at the beginning of an answer to a request with a schema or a grammar.

        Raises :class:`UserError` naming the field, with the library's reason.
        """
        grammar = _grammar(params)
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        if found is None:
            found = self._compile(grammar, params.constraint_name)
            with self._lock:
                self._compiled[grammar] = found
                while len(self._compiled) > COMPILED:
                    self._compiled.popitem(last=False)
        return Matcher(found.deep_copy())

    def _compile(self, grammar: str, name: str) -> llguidance.LLMatcher:
        if self.tokenizer.eos_id >= self.vocab_size:
            raise UserError(f"{name} needs end of sentence among the model's {self.vocab_size} tokens")
        self._rehearse(grammar, name)
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        first = matcher.deep_copy()  # the table's own never moves
        words_1W = np.zeros((1, -(-self.vocab_size // 32)), dtype=np.int32)
        if not first.is_error():
            first.unsafe_compute_mask_ptr(words_1W.ctypes.data, words_1W.nbytes)
        if first.is_error() or not words_1W.any():
            reason = " ".join(first.get_error().replace("<non-verbose/>", "").split())
            raise UserError(f"{name} is refused: {reason[:200] or 'no answer fits it'}")
        return matcher

    def _rehearse(self, grammar: str, name: str) -> None:
        asked = {
            "grammar": grammar, "special": sorted(self.tokenizer.added, key=self.tokenizer.added.__getitem__),
            "limits": LIMITS, "seconds": SECONDS, "bytes": MEMORY,
        }  # fmt: skip
        script = Path(__file__).with_name("rehearsal.py")
        try:
            code = subprocess.run(
                [sys.executable, "-P", str(script)], input=json.dumps(asked).encode(), timeout=PATIENCE,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = 1
        if code:
            raise UserError(
                f"{name} is refused: compiling it takes more than {SECONDS} s, {MEMORY >> 20} MiB or too deep"
                " a stack; make it simpler"
            )


class _Vocabulary:
    """A tokenizer as :class:`llguidance.TokenizerWrapper` wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokens = tokenizer.token_bytes[:vocab_size]
        self.special_token_ids = [number for number in tokenizer.added.values() if number < vocab_size]
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = None
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._encode(text)


def _grammar(params: SamplingParams) -> str:
    """The library's form of a request's schema or grammar."""
    text = params.constraint
    assert text is not None
    if params.json_schema is None:
        return llguidance.LLMatcher.grammar_from_lark(text)
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise UserError(f"json_schema is refused: {error}") from None
