"""What every check gets: the exported folder, prompts from held-out text, and what our own engine answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dsv3
from dsv3.common.errors import UserError
from dsv3.data.shards import open_split

CHARACTERS, TOKENS = 160, 32  # of a prompt, of an answer
PROMPTS = 3  # a source


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: ``what``, whether it ``agrees``, and the ``figure`` that says so."""

    what: str
    agrees: bool
    figure: str


@dataclass(frozen=True)
class Case:
    """``folder``: the model, in FP32. ``llama``: llama.cpp's folder. ``scratch``: to write to."""

    folder: Path
    texts: tuple[str, ...]
    llama: Path | None
    scratch: Path

    @property
    def prompts(self) -> list[str]:
        """The beginnings of some of the texts."""
        return [text[:CHARACTERS].rstrip() for text in self.texts]

    @cached_property
    def llm(self) -> Any:
        """Our engine on the folder."""
        return dsv3.LLM(self.folder, dtype="float32")

    @cached_property
    def answers(self) -> list[Any]:
        """Its greedy answers to the prompts, one after the other."""
        greedy = dsv3.SamplingParams(temperature=0, max_tokens=TOKENS)
        return [self.llm.generate([prompt], greedy)[0] for prompt in self.prompts]


def held_out_texts(data: Path) -> tuple[str, ...]:
    """The beginnings of held-out documents of a prepared folder, some of every source."""
    found = []
    for name, _, _ in open_split(data, "valid"):
        path = data / "valid" / name / "text.jsonl"
        if not path.is_file():
            raise UserError(f"--data ({data}) keeps no held-out text of {name}: prepare it again")
        with open(path, encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        texts = [text for text in texts if len(text) >= 4 * CHARACTERS]
        found += texts[:PROMPTS]
    if not found:
        raise UserError(f"--data ({data}) has no held-out document of {4 * CHARACTERS} characters")
    return tuple(found)
