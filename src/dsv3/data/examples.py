"""Examples of fine-tuning as tokens, each marked as bearing loss or not (report 5.1).

Three kinds of rows, told apart by their columns:

* ``messages``: a conversation; what the assistant says bears loss, in every turn.
* ``prompt`` and ``completion``: texts (one question, one answer) or lists of messages; the completion
  bears loss.
* ``text``: a document; all of it bears loss.

Conversations are written in the released chat format (:mod:`dsv3.data.chat`). An assistant's message may
have its reasoning apart, in ``reasoning_content``, as DeepSeek's API hands it out. ``tools`` beside the
messages are told in the system prompt; other columns are left alone.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np

from dsv3.common.errors import UserError
from dsv3.data import chat
from dsv3.data.rows import Row
from dsv3.data.special import BOS, END_THINK, EOS, THINK
from dsv3.data.tokenizer import Tokenizer

KINDS = "messages, prompt and completion, or text"
CHUNK = 256  # rows tokenised at once


def pieces(fields: Mapping[str, Any], keep_think: bool = True) -> list[chat.Piece]:
    """One row as runs of text, begin and end of sentence included; ``answer`` marks what bears loss.

    ``keep_think`` False drops the answers' reasoning, as the released chat template does. Raises
    :class:`UserError` naming what is missing or malformed.
    """
    tools = fields.get("tools") or None
    if fields.get("messages") is not None:
        messages = _conversation(fields["messages"], "messages")
        if not any(message.get("role") == "assistant" for message in messages):
            raise UserError("messages holds no message of the assistant: nothing would bear loss")
        return chat.pieces(messages, tools=tools, keep_think=keep_think)
    if fields.get("prompt") is not None or fields.get("completion") is not None:
        if fields.get("prompt") is None or fields.get("completion") is None:
            missing = "completion" if fields.get("completion") is None else "prompt"
            raise UserError(f"{missing} is missing: prompt and completion go together")
        asked = _conversation(_as_messages(fields["prompt"], "user"), "prompt")
        said = _conversation(_as_messages(fields["completion"], "assistant"), "completion")
        if said[0].get("role") != "assistant" or any(message.get("role") == "system" for message in said):
            raise UserError("completion must begin with a message of the assistant and hold none of system")
        found = chat.pieces([*asked, *said], tools=tools, keep_think=keep_think)
        # Answers in the prompt are context: what was asked ends where the assistant is about to speak.
        context = chat.pieces(asked, tools=tools, keep_think=keep_think, add_generation_prompt=True)
        given = len(context)
        return [replace(piece, answer=piece.answer and i >= given) for i, piece in enumerate(found)]
    text = fields.get("text")
    if text is None:
        raise UserError(f"the row has {', '.join(fields) or 'no column'}; it needs {KINDS}")
    if not isinstance(text, str) or not text:
        raise UserError(f"text ({text!r}) must be a string that is not empty")
    return [chat.Piece(BOS, control=True), chat.Piece(text, answer=True), chat.Piece(EOS, True, True)]


def encode(tokenizer: Tokenizer, rows: Sequence[list[chat.Piece]]) -> Iterator[tuple[list[int], list[bool]]]:
    """For the pieces of each row: its token ids, and for each whether it bears loss.

    Control tokens come from the format alone: a text that looks like one becomes ordinary tokens. All texts
    are encoded at once, which is several times as fast as one by one.
    """
    plain = iter(tokenizer.encode_batch([p.text for row in rows for p in row if not p.control]))
    for row in rows:
        ids: list[int] = []
        bears: list[bool] = []
        for piece in row:
            new = [tokenizer.special(piece.text)] if piece.control else next(plain)
            ids += new
            bears += [piece.answer] * len(new)
        yield ids, bears


def _as_messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _conversation(value: Any, column: str) -> list[Mapping[str, Any]]:
    """Messages with their reasoning put where the template has it."""
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        text = "" if column == "messages" else "a text or "
        raise UserError(f"{column} ({value!r}) must be {text}a list of messages that is not empty")
    found = []
    for number, message in enumerate(value):
        thought = message.get("reasoning_content")
        if thought:
            if not isinstance(thought, str) or message.get("role") != "assistant":
                raise UserError(f"{column}[{number}].reasoning_content must be a string, of the assistant's")
            content = f"{THINK}\n{thought}\n{END_THINK}\n\n{message.get('content') or ''}"
            message = {**message, "content": content}
        found.append(message)
    return found


def spans(tokenizer: Tokenizer, ids: np.ndarray, bears: np.ndarray) -> list[tuple[str, bool]]:
    """An example as text again: runs of tokens that bear loss, or do not."""
    borders = [0, *(np.flatnonzero(np.diff(bears)) + 1).tolist(), len(ids)]
    return [(tokenizer.decode(ids[a:b].tolist()), bool(bears[a])) for a, b in pairwise(borders)]


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, one behind the other: example i is ``ids[starts[i] : starts[i + 1]]``.

    ``bears``: the tokens that bear loss. ``read``: rows in all, of which ``cut`` were shortened and
    ``dropped`` left out for their length (or because nothing of what was left bears loss).
    """

    ids: np.ndarray  # uint32
    bears: np.ndarray  # bool
    starts: np.ndarray  # int64 [n + 1]
    read: int
    cut: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.starts)

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of one example, and which bear loss."""
        here = slice(self.starts[number], self.starts[number + 1])
        return self.ids[here], self.bears[here]

    def fingerprint(self) -> int:
        """A number of 63 bits that changes with any token or mark: what a resumed run compares."""
        digest = hashlib.sha256()
        for part in (self.ids, self.bears, self.starts):
            digest.update(part.tobytes())
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    def split(self, fraction: float) -> tuple[Examples, Examples]:
        """Two parts, the second with about ``fraction`` of the examples, chosen by their content.

        Equal examples fall on the same side, in every order and under every seed: nothing held out has been
        trained on.
        """
        held = np.array([_share(self.example(i)[0]) < fraction for i in range(len(self))], dtype=bool)
        return self._where(~held), self._where(held)

    def _where(self, chosen: np.ndarray) -> Examples:
        lengths = self.lengths
        mask = np.repeat(chosen, lengths)
        starts = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
        return Examples(self.ids[mask], self.bears[mask], starts, self.read, self.cut, self.dropped)


def _share(ids: np.ndarray) -> float:
    """A number in [0, 1) that depends on the tokens alone."""
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "big") / 2**64


def gather(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    length: int,
    *,
    keep_think: bool = True,
    long: Literal["cut", "drop", "refuse"] = "cut",
) -> Examples:
    """Tokenise every row. One longer than ``length`` tokens is cut there, dropped, or refused.

    Raises :class:`UserError` naming the line of the first bad row, and if no row is left.
    """
    ids, bears, starts = array("I"), bytearray(), array("q", [0])
    read = cut = dropped = 0
    for chunk in _batched(rows, CHUNK):
        found = [_pieces_of(row, keep_think) for row in chunk]
        for row, (new, marked) in zip(chunk, encode(tokenizer, found)):
            read += 1
            too_long = len(new) > length
            if too_long and long == "refuse":
                raise UserError(
                    f"{row.where} has {len(new)} tokens, more than sequence_length ({length}): raise that, or"
                    " let data.long cut or drop such examples"
                )
            if (too_long and long == "drop") or not any(marked[:length]):
                dropped += 1
                continue
            ids.extend(new[:length])
            bears.extend(marked[:length])
            starts.append(len(ids))
            cut += too_long
    if len(starts) == 1:
        why = f"all {read} rows were dropped: raise sequence_length ({length})" if read else "there is no row"
        raise UserError(f"the data holds no example: {why}")
    return Examples(
        np.array(ids, dtype=np.uint32),
        np.frombuffer(bytes(bears), dtype=np.bool_),
        np.array(starts, dtype=np.int64),
        read,
        cut,
        dropped,
    )


def tokens(tokenizer: Tokenizer, row: Row, keep_think: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """One row's token ids and which bear loss; :class:`UserError` names the row's line."""
    ((ids, bears),) = encode(tokenizer, [_pieces_of(row, keep_think)])
    return np.array(ids, dtype=np.uint32), np.array(bears, dtype=np.bool_)


def _pieces_of(row: Row, keep_think: bool) -> list[chat.Piece]:
    try:
        return pieces(row.fields, keep_think)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None


def _batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of up to ``size`` rows."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk
