"""Data recipes: where text comes from, which tokenizer, how it is cut; and manifests of fetched packages."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dsv3.config.recipe import Recipe

KINDS = ("paths", "stdlib", "packages", "manifest", "huggingface")
SUFFIXES = ["txt", "md", "rst", "py", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


class HuggingFaceConfig(Recipe):
    """One data set of the Hugging Face hub, streamed (needs ``pip install 'dsv3[data]'`` and a network)."""

    path: str = Field(
        description="name of the data set on the hub, or a local folder that `datasets` can load"
    )
    name: str | None = Field(None, description="configuration of the data set; null: its default")
    split: str = Field("train", description="split of the data set to read")
    max_documents: int | None = Field(None, gt=0, description="read at most this many documents; null: all")


class NeedlesConfig(Recipe):
    """Documents that teach a model to find what stands far back: key-value needles in a source's text."""

    shortest: int = Field(500, gt=0, description="characters of text in the shortest document")
    longest: int = Field(1000, gt=0, description="characters in the longest; lengths' logarithms are even")
    every: int = Field(100, gt=0, description="characters of text a needle")
    asks: int = Field(1, gt=0, description="questions on each needle, behind it")
    passes: int = Field(1, gt=0, description="times the text is read, with other needles each time")
    keys: int = Field(246, ge=1, le=246, description="nouns that keys are drawn from, from the first on")
    values: int = Field(90, ge=1, le=90, description="numbers that values are drawn from, from 10 on")
    bare: bool = Field(
        False,
        description="leave out the text and all words but keys and values: a document is a list of as many"
        " needles as its text would hold, each said once and once more for each question, in any order",
    )

    @model_validator(mode="after")
    def _order(self) -> NeedlesConfig:
        if self.shortest > self.longest:
            raise ValueError(f"needles.shortest ({self.shortest}) exceeds needles.longest ({self.longest})")
        return self


class SourceConfig(Recipe):
    """One named source of documents. Exactly one of paths, stdlib, packages, manifest, huggingface is set."""

    name: str = Field(
        description="name of the source: its folder under train/ and valid/, and its key in metrics"
    )
    weight: float = Field(
        1.0, gt=0, description="share of training samples from this source, relative to the other weights"
    )
    paths: list[str] | None = Field(
        None, description="files, folders (searched through) and globs (** allowed)"
    )
    stdlib: bool = Field(False, description="the running Python's standard library (.py), without its tests")
    packages: list[str] | None = Field(
        None, description="installed Python packages, by name: their .py, .md, .rst, .txt"
    )
    manifest: str | None = Field(
        None, description="a manifest of registry packages that `dsv3 data fetch` has fetched into `folder`"
    )
    folder: str | None = Field(
        None, description="with manifest: the folder that `dsv3 data fetch --to` filled"
    )
    huggingface: HuggingFaceConfig | None = Field(None, description="a data set of the Hugging Face hub")
    suffixes: list[str] = Field(
        SUFFIXES,
        description="with paths: file endings that are read inside folders; jsonl, jsonl.gz, jsonl.zst and"
        " parquet hold one document a row, any other file is one plain-text document",
    )
    text_field: str = Field(
        "text", description="field of a jsonl, parquet or hub row that holds the document"
    )
    max_document_chars: int | None = Field(
        None, ge=256,
        description="characters; a longer document (a whole book) is cut at blank lines, else at line breaks;"
        " null: never cut",
    )  # fmt: skip
    needles: NeedlesConfig | None = Field(
        None, description="put key-value needles and questions on them into the text; null: the text as it is"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", value):
            raise ValueError("a source's name becomes a folder: use letters, digits, - and _ only")
        return value

    @property
    def kind(self) -> str:
        """Which of the five kinds of source this is."""
        return next(kind for kind in KINDS if getattr(self, kind))

    @model_validator(mode="after")
    def _one_kind(self) -> SourceConfig:
        kinds = [kind for kind in KINDS if getattr(self, kind)]
        if len(kinds) != 1:
            found = " and ".join(kinds) if kinds else "none"
            raise ValueError(f"source {self.name} needs exactly one of {', '.join(KINDS)} (found {found})")
        if (self.manifest is None) != (self.folder is None):
            raise ValueError(f"source {self.name}: manifest and folder go together")
        return self


class TokenizerConfig(Recipe):
    """Which tokenizer: a file, or byte-level BPE trained on the recipe's own training documents."""

    path: str | None = Field(
        None, description="a tokenizer.json or a folder with one (the released V3 one works); null: train one"
    )
    vocab_size: int = Field(
        8192, ge=256 + 20, description="tokens, all special tokens included; used when a tokenizer is trained"
    )
    train_bytes: int = Field(
        100_000_000,
        gt=0,
        description="bytes of text to train it on; a larger corpus is sampled by document hash",
    )


class DataRecipe(Recipe):
    """`dsv3 data prepare`: text into token shards. `dsv3 tokenizer train` reads the same recipe."""

    out: str = Field(description="folder to write: train/, valid/, manifest.json, tokenizer.json")
    sources: list[SourceConfig] = Field(description="the sources of documents", min_length=1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    seed: int = Field(0, ge=0, description="seed of the document order, of FIM and of the boundary split")
    valid_fraction: float = Field(
        0.01, ge=0, lt=1,
        description="share of documents held out, chosen by the hash of their text (the same for any seed)",
    )  # fmt: skip
    fim_rate: float = Field(
        0.1, ge=0, le=1,
        description="share of training documents made fill-in-the-middle, PSM order (report 4.1: 0.1)",
    )  # fmt: skip
    boundary_split_prob: float = Field(
        0.1, ge=0, le=1,
        description="probability that a training token joining punctuation and line breaks is split in two"
        " (report 4.1 says a certain proportion and no number)",
    )  # fmt: skip
    decontaminate: list[str] = Field(
        [], description="evaluation files (txt, md, jsonl, jsonl.gz): documents sharing 13 words in a row go"
    )
    shard_bytes: int = Field(
        64_000_000, ge=1000, description="bytes of text (about) behind one group of shards, the unit of"
        " parallel work and of resuming",
    )  # fmt: skip
    workers: int = Field(
        0, ge=0, description="processes; 0: one for every CPU core. The result does not depend on it"
    )

    @model_validator(mode="after")
    def _names(self) -> DataRecipe:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"sources: the name {name} appears {names.count(name)} times; names must differ"
                )
        return self


class PackageRow(Recipe):
    """One row of a manifest: a package of a public registry and the text in it."""

    kind: Literal["pypi", "npm", "apt"] = Field(
        description="registry: pypi (wheels only: fetching a source archive would run its code), npm or apt"
    )
    name: str = Field(description="name of the package in its registry")
    version: str = Field(description="exact version")
    sha256: str = Field(
        description="SHA-256 of the package file as the registry serves it", pattern="^[0-9a-f]{64}$"
    )
    licence: str = Field(description="licence of the text, as found in the package")
    glob: list[str] = Field(
        description="which files inside the package hold text (* stays in a folder, ** crosses)"
    )
    extract: Literal["plain", "python-strings"] = Field(
        "plain",
        description="plain: the file is the text; python-strings: the long string constants in a .py file",
    )

    @field_validator("name", "version")
    @classmethod
    def _plain_word(cls, value: str) -> str:
        # These become command arguments: no option, no path, no address.
        if not re.fullmatch(r"(@[a-z0-9][a-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9.+~:_-]*", value):
            raise ValueError("must be a plain package name or version")
        return value


class ManifestConfig(Recipe):
    """`dsv3 data fetch`: which packages to fetch text from."""

    packages: list[PackageRow] = Field(description="the packages", min_length=1)
