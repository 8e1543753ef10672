"""Compiles a grammar in a process of its own, before a server does: run by :mod:`dsv3.serve.grammar`.

A text of a few kilobytes can take a compiler minutes, gigabytes or all of its stack (rules that only name the
next one, intersections of regular expressions). The library bounds much of that, not all. Here it costs a
process, which ends with 0 if the grammar is harmless, whether or not it is right.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from typing import Any

import llguidance

STACK = 1 << 20  # bytes: an eighth of what a thread of the server has


class Bytes:
    """The 256 bytes and the control tokens, as :class:`llguidance.TokenizerWrapper` wants them."""

    def __init__(self, special: list[str]):
        self.tokens = [bytes([byte]) for byte in range(256)] + [name.encode() for name in special]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = self.bos_token_id = 256

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(text.encode())


def rehearse(grammar: str, special: list[str], limits: dict[str, Any]) -> None:
    """Compile, and look for the first token."""
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes(special)))
    parser_limits = llguidance.LLParserLimits(**limits)
    llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits).compute_bitmask()


def main() -> None:
    """Read the grammar and the limits as JSON from standard input."""
    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (asked["bytes"], asked["bytes"]))
    threading.stack_size(STACK)
    thread = threading.Thread(target=rehearse, args=(asked["grammar"], asked["special"], asked["limits"]))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
