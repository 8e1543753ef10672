"""The exceptions that reach a person as one line, never as a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line naming the field, the value and the way out.

    The command line prints it without a traceback and exits with ``exit_code``. ``shared``: every process of
    a run raises it, so that one of them says it.
    """

    exit_code = 2
    shared = True


class Failure(UserError):
    """The input was fine and the work failed all the same (a full disk, a loss that stays infinite)."""

    exit_code = 1
    shared = False


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` for the known word closest to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
