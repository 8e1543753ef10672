"""Algebra judged by math-verify, where it is installed (extra ``[rl]``).

math-verify bounds its time by a signal, which exists in the main thread alone, and reads hostile input with a
computer algebra system that may not return. So it runs as a service in the sandbox: rewards may be computed
from any thread, and an answer that takes too long is simply not equal.
"""

from __future__ import annotations

import functools
import importlib.util

from dsv3.evaluate.sandbox import Service
from dsv3.evaluate.verify import LONGEST

SETUP = r"""
from math_verify import parse, verify

def answer(request):
    gold, given = (parse("$" + text + "$", parsing_timeout=None) for text in request)
    return bool(gold and given and verify(gold, given, timeout_seconds=None))
"""


@functools.cache
def _service() -> Service | None:
    return Service(SETUP, seconds=5.0) if importlib.util.find_spec("math_verify") else None


def same_mathematics(given: str, wanted: str) -> bool | None:
    """Whether two TeX expressions are the same; None where math-verify is absent or gave up."""
    service = _service()
    if service is None or len(given) > LONGEST:
        return None
    value = service.ask([wanted, given])
    return None if value is None else bool(value)
