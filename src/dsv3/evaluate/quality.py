"""Bits per byte of a model as its folder has it, and beside that in other number formats."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.hf import check_quantize, load
from dsv3.common.errors import UserError
from dsv3.common.progress import Progress
from dsv3.data.loader import Batch, TokenLoader
from dsv3.data.shards import open_split
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluate.held_out import HeldOut, evaluate

AS_STORED = "as stored"


def read(tokenizer: Tokenizer, source: Path, length: int, sequences: int) -> dict[str, Tensor]:
    """So many sequences ``[S, length + 1]``, or fewer, of prepared data's held-out part or of a text file.

    Of prepared data each source's own, drawn from all of it and always the same; a file's first. Raises
    :class:`UserError` for text shorter than one sequence, and for data of another tokenizer.
    """
    if source.is_dir():
        if not (source / "manifest.json").is_file():
            raise UserError(
                f"--data ({source}) holds no prepared data (no manifest.json): run dsv3 data prepare"
                " on it, or give one text file"
            )
        if Tokenizer.load(source).token_bytes != tokenizer.token_bytes:
            raise UserError(f"--data ({source}) has another tokenizer than the model; give it as a text file")
        found = {}
        for name, shards, _ in open_split(source, "valid"):
            loader = TokenLoader([(shards, 1.0)], length)
            found[name] = loader.batch(0, min(sequences, loader.samples[0])).tokens_BT
        return found
    if not source.exists():
        raise UserError(f"--data ({source}) does not exist; give prepared data, or a text file")
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data ({source}) is no prepared data and no text in UTF-8: {error}") from None
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    if len(ids) <= length:
        raise UserError(f"--data ({source}) has {len(ids)} tokens; --length ({length}) must be less")
    return {source.name: ids.unfold(0, length + 1, length)[:sequences]}


def compare(
    folder: Path, source: Path, formats: list[str], length: int = 256, sequences: int = 128
) -> dict[str, dict[str, HeldOut]]:
    """For the folder as it is, and quantised in each of ``formats``: the figures of each source.

    Raises :class:`UserError` for what :func:`dsv3.load` and :func:`read` refuse.
    """
    for name in formats:
        check_quantize(folder, name)
    tokenizer = Tokenizer.load(folder)
    texts = read(tokenizer, source, length, sequences)
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths).long()
    found: dict[str, dict[str, HeldOut]] = {}
    with Progress("evaluate", (1 + len(formats)) * len(texts), "texts") as progress:
        for name in [AS_STORED, *formats]:
            model = load(folder, quantize=None if name == AS_STORED else name).eval()
            found[name] = {}
            for text, tokens_SX in texts.items():
                found[name][text] = evaluate(model, Batch(tokens_SX), byte_lengths, length)
                progress.advance(1)
            del model  # before the next is there
    return found
