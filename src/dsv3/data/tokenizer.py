"""Byte-level BPE built as DeepSeek's: training, loading any ``tokenizer.json``, safe encoding of any text.

Ids 0-2 are begin and end of sentence and padding; then the 256 bytes and the merges; the control tokens come
last. Strings, order and pre-tokenizer are those of the released V3/R1 tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from dsv3.common.errors import UserError
from dsv3.common.files import write_atomic, write_json
from dsv3.data.chat import TEMPLATE
from dsv3.data.pretokens import PretokenEncoder
from dsv3.data.special import CONTROL, FIRST, NAMES, SHOWN

# The released pre-tokenizer's three patterns, each isolating what it matches.
PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
LONG = 10_000  # characters from which on a text is encoded as a batch of one
MAX_LENGTH = 131_072  # tokens; the released tokenizer's model_max_length


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )


def _is_deepseek(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json cuts text exactly as DeepSeek's does and merges without chance."""
    like = tokenizers.Tokenizer(models.BPE())
    like.pre_tokenizer = _pre_tokenizer()
    no_normalizer = not content["normalizer"] or content["normalizer"] == {
        "type": "Sequence",
        "normalizers": [],
    }
    return (
        no_normalizer
        and content["pre_tokenizer"] == json.loads(like.to_str())["pre_tokenizer"]
        and content["model"]["type"] == "BPE"
        and not content["model"].get("dropout")
    )


def _bytes_of_characters() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2's printable alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


def clean(text: str) -> str:
    """Replace lone surrogates (legal in JSON, not in UTF-8) by U+FFFD; leave everything else."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """A ``tokenizers.Tokenizer`` whose plain encoding never produces a special token."""

    def __init__(self, inner: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        """``config``: the content of a tokenizer_config.json, kept when the tokenizer is saved again."""
        self.inner = inner
        self.config = config or {}
        content = json.loads(inner.to_str())
        self.added = {token["content"]: token["id"] for token in content["added_tokens"]}
        # Most released control tokens are not marked special, so the library would parse them out of plain
        # text whatever its settings: the plain encoder knows no added token at all.
        content["added_tokens"] = []
        content["post_processor"] = None
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._pretokens = PretokenEncoder(self._plain) if _is_deepseek(content) else None
        longest_first = sorted(self.added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if self.added else None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a ``tokenizer.json`` or a folder with one; :class:`UserError` if it cannot be read."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise UserError(f"model or tokenizer {path} does not exist; give a folder with a tokenizer.json")
        if not file.is_file():
            raise UserError(
                f"{path} holds no tokenizer.json: copy the tokenizer's files there from where the model was "
                "made, or train one with dsv3 tokenizer train"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for anything wrong in the file
            raise UserError(f"tokenizer {file} cannot be read: {error}") from None
        try:
            config = json.loads((file.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}
        return cls(inner, config)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers and vLLM read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config or {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": FIRST[0],
            "eos_token": FIRST[1],
            "pad_token": FIRST[2],
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_LENGTH,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": TEMPLATE,
        }
        write_json(folder / "tokenizer_config.json", config)
        write_atomic(folder / "tokenizer.json", self.inner.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id (special tokens included)."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values())

    def special(self, name: str) -> int:
        """Id of a special token by short name (``bos``, ``fim_hole``, ``user``, ...) or by its string."""
        string = NAMES.get(name, name)
        number = self.added.get(string)
        if number is None and name in ("bos", "eos", "pad"):  # another family's tokenizer
            entry = self.config.get(f"{name}_token")
            number = self.added.get(entry["content"] if isinstance(entry, dict) else entry or "")
        if number is None:
            raise UserError(f"the tokenizer has no special token {name} ({string})")
        return number

    @property
    def bos_id(self) -> int:
        """Begin of sentence."""
        return self.special("bos")

    @property
    def eos_id(self) -> int:
        """End of sentence: ends every document and every answer."""
        return self.special("eos")

    @property
    def pad_id(self) -> int:
        """Padding."""
        return self.special("pad")

    @property
    def fim_begin_id(self) -> int:
        """Before the prefix of a fill-in-the-middle document."""
        return self.special("fim_begin")

    @property
    def fim_hole_id(self) -> int:
        """Between prefix and suffix."""
        return self.special("fim_hole")

    @property
    def fim_end_id(self) -> int:
        """Before the middle."""
        return self.special("fim_end")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``; only with ``special=True`` do strings like ``<｜User｜>`` become tokens.

        Nothing is added in front or behind. Lone surrogates are encoded as U+FFFD.
        """
        text = clean(text)
        if not special or self._split is None:
            return self._ids(text)
        ids: list[int] = []
        for place, piece in enumerate(self._split.split(text)):
            if place % 2:
                ids.append(self.added[piece])
            elif piece:
                ids.extend(self._ids(piece))
        return ids

    def _ids(self, text: str) -> list[int]:
        if len(text) < LONG:
            return self._plain.encode(text, add_special_tokens=False).ids
        # A second a megabyte or more, and only the library's batches let other threads run meanwhile.
        return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain ids of many texts, the same as :meth:`encode` gives one by one but faster."""
        texts = [clean(text) for text in texts]
        if self._pretokens is not None:
            return self._pretokens.encode_batch(texts)
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids; ``skip_special`` leaves out all added tokens but the think tags.

        Bytes that are not valid UTF-8 (a token may end inside a character) become U+FFFD.
        """
        hidden = self.hidden_ids if skip_special else frozenset()
        pieces = [self.token_bytes[i] for i in ids if i not in hidden]
        return b"".join(pieces).decode("utf-8", "replace")

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Tokens a reader does not see: the control tokens but for the think tags."""
        return frozenset(number for string, number in self.added.items() if string not in SHOWN)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes each token id stands for; a special token stands for its string."""
        table = _bytes_of_characters()
        found = [b""] * self.vocab_size
        for string, number in self.inner.get_vocab(with_added_tokens=True).items():
            if string in self.added or not all(character in table for character in string):
                found[number] = string.encode()
            else:
                found[number] = bytes(table[character] for character in string)
        return found

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes of text each token stands for; 0 for special tokens."""
        lengths = np.array([len(token) for token in self.token_bytes], dtype=np.int64)
        lengths[list(self.added.values())] = 0
        return lengths

    def bytes_of(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes of text that a sequence of token ids stands for: the unit of bits per byte."""
        return int(self.byte_lengths[np.asarray(ids, dtype=np.int64)].sum())

    @cached_property
    def joined(self) -> dict[int, tuple[list[int], list[int]]]:
        """Tokens that join punctuation and line breaks, and the two sequences each can be split into."""
        found = {}
        specials = set(self.added.values())
        for number, piece in enumerate(self.token_bytes):
            if number in specials:
                continue
            try:
                text = piece.decode()
            except UnicodeDecodeError:
                continue
            head = text.rstrip("\r\n")
            marks = head.removeprefix(" ")
            if len(head) < len(text) and marks and all(unicodedata.category(c)[0] in "PS" for c in marks):
                found[number] = (self.encode(head), self.encode(text[len(head) :]))
        return found

    @cached_property
    def _is_joined(self) -> np.ndarray:
        mask = np.zeros(self.vocab_size, dtype=bool)
        mask[list(self.joined)] = True
        return mask

    def split_boundaries(self, ids: np.ndarray, prob: float, rng: np.random.Generator) -> np.ndarray:
        """Split each token that joins punctuation and line breaks with probability ``prob`` (report 4.1).

        For training only: it lessens the bias of prompts that end in punctuation without a line break. The
        text the ids stand for stays the same and special tokens are never touched.
        """
        places = np.flatnonzero(self._is_joined[ids])
        places = places[rng.random(len(places)) < prob]
        if not len(places):
            return ids
        pieces: list[Any] = []
        last = 0
        for place in places.tolist():
            head, breaks = self.joined[int(ids[place])]
            pieces += [ids[last:place], head, breaks]
            last = place + 1
        pieces.append(ids[last:])
        return np.concatenate([np.asarray(piece, dtype=ids.dtype) for piece in pieces])


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on ``texts`` the way DeepSeek's was built.

    ``vocab_size`` counts every token, special ones included. A corpus too small for it gives a smaller
    vocabulary: read :attr:`Tokenizer.vocab_size`. Raises :class:`UserError` below 256 bytes + specials.
    """
    smallest = 256 + len(FIRST) + len(CONTROL)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size ({vocab_size}) must be at least {smallest}: 256 bytes and the special tokens"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = _pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL),
        special_tokens=[AddedToken(string, normalized=False, special=True) for string in FIRST],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator((clean(text) for text in texts), trainer)
    inner.add_tokens([AddedToken(string, normalized=True, special=special) for string, special in CONTROL])
    return Tokenizer(inner)
