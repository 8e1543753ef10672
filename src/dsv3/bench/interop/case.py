"""What every check gets: the exported folder, prompts from held-out text, and what our own engine answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import dsv3
from dsv3.common.errors import UserError
from dsv3.common.files import write_json
from dsv3.data.shards import open_split

CHARACTERS, TOKENS = 160, 32  # of a prompt, of an answer
LONG = 4 * CHARACTERS  # of a prompt of the extended model
ORIGINAL, FACTOR = 64, 40  # tokens it is extended from, far fewer than such a prompt's, and how many times
YARN = {  # llama.cpp takes the last two to be equal
    "type": "yarn", "factor": FACTOR, "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1,
}  # fmt: skip
PROMPTS = 3  # a source


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: ``what``, whether it ``agrees``, and the ``figure`` that says so."""

    what: str
    agrees: bool
    figure: str


@dataclass(frozen=True)
class Case:
    """``folder``: the model, in FP32. ``llama``: llama.cpp's folder. ``scratch``: to write to.

    ``characters``: of a prompt, at most.
    """

    folder: Path
    texts: tuple[str, ...]
    llama: Path | None
    scratch: Path
    characters: int = CHARACTERS

    @property
    def prompts(self) -> list[str]:
        """The beginnings of some of the texts."""
        return [text[: self.characters].rstrip() for text in self.texts]

    @cached_property
    def extended(self) -> Case:
        """The same weights with YaRN in their config.json, and prompts beyond the original length."""
        folder = self.scratch / "extended"
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"rope_scaling": YARN, "max_position_embeddings": FACTOR * ORIGINAL}
        write_json(folder / "config.json", config)
        return replace(self, folder=folder, characters=LONG)

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
        texts = [text for text in texts if len(text) >= LONG]
        found += texts[:PROMPTS]
    if not found:
        raise UserError(f"--data ({data}) has no held-out document of {LONG} characters")
    return tuple(found)
