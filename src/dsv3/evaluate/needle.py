"""Needle in a haystack: is a sentence found again, at any depth of a context of any length (report 4.3)?

A cell of the grid is a length and a depth. Its prompts are held-out text of exactly that many tokens with one
needle in it at that depth, ``distractors`` needles with other keys anywhere, and the question at the end
(:mod:`dsv3.data.needles`). The answer is right if the number it begins with is the needle's, which no
distractor has. Where the haystack is prepared data with needles, keys and values are those it teaches.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.checkpoint.hf import load, read_config
from dsv3.common.errors import UserError
from dsv3.common.files import write_json
from dsv3.common.progress import Progress
from dsv3.data.needles import KEYS, VALUES, needle, question, taught
from dsv3.data.shards import open_split
from dsv3.data.tokenizer import Tokenizer
from dsv3.data.writable import writable
from dsv3.serve.llm import LLM
from dsv3.serve.params import SamplingParams

FORMAT = "dsv3-needle/2"
SENTENCE_END = (b".", b"!", b"?", b";")  # no colon: a needle would part another's "Remember:" from its key


@dataclass(frozen=True)
class Grid:
    """What is asked: ``samples`` prompts for each of ``lengths`` (tokens) and ``depths`` (0 front, 1 end)."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int = 4
    distractors: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} ({', '.join(map(str, values))}) must be one or more, each once")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"depths ({self.depths}) must lie from 0, the front, to 1, the end")


@dataclass(frozen=True)
class Trial:
    """One prompt and what must come: ``prompt`` are token ids, as many as the cell is long."""

    length: int
    depth: float
    sample: int
    key: str
    value: int
    prompt: list[int]


class Haystack:
    """Text as a model's tokens, after which of them a sentence ends, and what to hide in it."""

    def __init__(
        self,
        text: str,
        tokenizer: Tokenizer,
        name: str,
        keys: Sequence[str] = KEYS,
        values: Sequence[int] = VALUES,
    ):
        self.tokenizer, self.name, self.keys, self.values = tokenizer, name, keys, values
        self.tokens = tokenizer.encode(text)
        if not self.tokens:
            raise UserError(f"haystack ({name}) holds no text; give prepared data, or a text file")
        self._ends = [piece.rstrip().endswith(SENTENCE_END) for piece in tokenizer.token_bytes]

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer, source: str | None = None) -> Haystack:
        """The held-out text of prepared data (its first source, or the one named), or a text file."""
        if not path.is_dir():
            try:
                return cls(path.read_text(encoding="utf-8"), tokenizer, path.name)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"--haystack ({path}) is no prepared data and no text in UTF-8: {error}"
                ) from None
        names = [name for name, _, _ in open_split(path, "valid")]
        name = source or names[0]
        if name not in names:
            raise UserError(f"--source ({name}) is not held out in {path}; there are {', '.join(names)}")
        lines = (path / "valid" / name / "text.jsonl").read_text(encoding="utf-8").splitlines()
        text = "\n".join(json.loads(line)["text"] for line in lines)
        return cls(text, tokenizer, f"{path.name}/{name}", *taught(path))

    def text(self, length: int, draw: random.Random) -> list[int]:
        """So many tokens from a drawn place on, from the start again where the text ends."""
        start = draw.randrange(len(self.tokens))
        repeats = 1 + (start + length) // len(self.tokens)
        return (self.tokens * repeats)[start : start + length]

    def place(self, tokens: list[int], depth: float) -> int:
        """The sentence end at or before ``depth`` of the text; 0, its front, where there is none."""
        for place in range(round(depth * len(tokens)), 0, -1):
            if self._ends[tokens[place - 1]]:
                return place
        return 0


def trials(haystack: Haystack, grid: Grid, length: int, sample: int) -> list[Trial]:
    """A prompt for each depth, the deepest first: the next share what comes before their needles.

    Text and distractors are the same at all depths; the needle's value is drawn for each.
    """
    encode = haystack.tokenizer.encode
    draw = random.Random(f"{grid.seed}:{length}:{sample}")
    fewest = min(len(haystack.keys), len(haystack.values))
    if not 0 <= grid.distractors < fewest:
        raise UserError(f"distractors ({grid.distractors}) must be from 0 to {fewest - 1}")
    keys = draw.sample(haystack.keys, grid.distractors + 1)
    wrong = {key: draw.choice(haystack.values) for key in keys[1:]}
    left = [value for value in haystack.values if value not in wrong.values()]
    hidden = {
        depth: random.Random(f"{grid.seed}:{length}:{sample}:{depth}").choice(left)
        for depth in sorted(grid.depths, reverse=True)
    }
    others = [encode(" " + needle(key, value)) for key, value in wrong.items()]
    asked = encode(" " + question(keys[0]))
    size = max(len(encode(" " + needle(keys[0], value))) for value in left)
    room = length - len(asked) - size - sum(map(len, others))
    if room < 1:
        raise UserError(f"lengths ({length}) leave no room for text beside needles and question; use more")
    text = haystack.text(room, draw)
    for other in others:
        place = haystack.place(text, draw.random())
        text = text[:place] + other + text[place:]
    found = []
    for depth, value in hidden.items():
        line = encode(" " + needle(keys[0], value))
        # A needle shorter by a token leaves one more of the text, so that every prompt is as long as said.
        body = text + text[: size - len(line)]
        place = haystack.place(body, depth)
        prompt = body[:place] + line + body[place:] + asked
        found.append(Trial(length, depth, sample, keys[0], value, prompt))
    return found


def is_right(answer: str, value: int) -> bool:
    """Whether the number the answer begins with is the needle's, to the last digit."""
    match = re.match(r"\s*(\d+)", answer)
    return match is not None and int(match[1]) == value


def measure(
    folder: Path, haystack: Path, grid: Grid, out: Path, *, source: str | None = None, **options: Any
) -> dict[str, Any]:
    """Ask every cell of the grid; returns what ``out``, a JSON file, holds at the end.

    ``out`` is written after each length and sample; a call that was interrupted goes on from there, and one
    that asks for more adds to it. ``options``: of :class:`dsv3.LLM`. Lengths beyond the model's
    ``max_position_embeddings`` are asked all the same, positions simply go on. Raises :class:`UserError` for
    bad input and for an ``out`` of another model, text or seed.
    """
    tokenizer = check(folder)
    text = Haystack.open(haystack, tokenizer, source)
    plan = [(length, sample) for length in sorted(grid.lengths) for sample in range(grid.samples)]
    for length in grid.lengths:
        trials(text, grid, length, 0)  # refuses what does not fit before any work
    about = {
        "format": FORMAT, "model": str(folder), "weights": _fingerprint(folder),
        "haystack": text.name, "keys": len(text.keys), "values": len(text.values),
        "distractors": grid.distractors, "seed": grid.seed,
    }  # fmt: skip
    cells = _found(out, about)
    have = {(c["length"], c["sample"], c["depth"]) for c in cells}
    todo = [
        missing
        for length, sample in plan
        if (missing := [t for t in trials(text, grid, length, sample) if _name(t) not in have])
    ]
    if todo:
        writable(out.parent, "--out")
        llm = _llm(folder, max(grid.lengths), **options)
        budget = max(len(tokenizer.encode(f"{value}.")) for value in text.values)
        params = SamplingParams(max_tokens=budget, temperature=0)
        total = sum(trial.length for group in todo for trial in group)
        with Progress("niah", total, "tok") as progress:
            for group in todo:
                answers = llm.generate([trial.prompt for trial in group], params)
                for trial, answer in zip(group, answers):
                    cell = {**asdict(trial), "answer": answer.text}
                    del cell["prompt"]
                    cells.append({**cell, "right": is_right(answer.text, trial.value)})
                progress.note(f"{sum(c['right'] for c in cells)}/{len(cells)} found")
                progress.advance(sum(trial.length for trial in group))
                write_json(out, {**about, "cells": cells})
    return {**about, "cells": cells}


def check(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder; :class:`UserError` where either is missing."""
    read_config(folder)
    return Tokenizer.load(folder)


def scores(result: dict[str, Any]) -> tuple[list[int], list[float], np.ndarray]:
    """Lengths, depths, and the share of right answers ``[depths, lengths]``; nan where none was asked."""
    cells = result["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    right, asked = np.zeros((len(depths), len(lengths))), np.zeros((len(depths), len(lengths)))
    for cell in cells:
        at = depths.index(cell["depth"]), lengths.index(cell["length"])
        right[at] += cell["right"]
        asked[at] += 1
    return lengths, depths, np.divide(right, asked, out=np.full_like(right, np.nan), where=asked > 0)


def _name(trial: Trial) -> tuple[int, int, float]:
    return trial.length, trial.sample, trial.depth


def _fingerprint(folder: Path) -> str:
    """Which weights these are, without reading them: names, sizes and times of the files."""
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _found(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a file begun before; refuses one that holds something else."""
    if not out.exists():
        return []
    try:
        before = json.loads(out.read_text(encoding="utf-8"))
        cells = before.pop("cells")
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{out} is no result of dsv3 niah; choose another --out") from None
    for key, value in about.items():
        if before.get(key) != value:
            raise UserError(f"{out} has {key} {before.get(key)!r}, not {value!r}; choose another --out")
    return list(cells)


def _llm(folder: Path, longest: int, **options: Any) -> LLM:
    """The engine over a model that takes prompts of ``longest`` tokens, whatever it was made for."""
    model = load(folder)
    longest += 16  # the answer
    if longest > model.config.max_position_embeddings:
        model.config = model.config.model_copy(update={"max_position_embeddings": longest})
    return LLM(model, tokenizer=Tokenizer.load(folder), max_length=longest, **options)
