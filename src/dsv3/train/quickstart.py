"""``dsv3 quickstart``: from the text Python already has to a trained model, in minutes, with pictures."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from dsv3.checkpoint.hf import load
from dsv3.common.errors import UserError
from dsv3.common.files import write_json
from dsv3.config import recipe as recipes
from dsv3.config.data import DataRecipe
from dsv3.config.train import PretrainRecipe
from dsv3.data.fetch import fetch
from dsv3.data.loader import TokenLoader
from dsv3.data.prepare import prepare
from dsv3.data.shards import TokenShards
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluate.held_out import evaluate, unigram_bits_per_byte, xz_bits_per_byte
from dsv3.evaluate.sample import complete
from dsv3.train.pretrain import pretrain

RECIPES = Path("recipes")
PROMPTS = ("def __init__(self", "import os\n", "And the LORD said unto Moses,")
HOLE = ("def mean(values):\n    total = ", "\n    return total / len(values)\n")  # fill in the middle


def quickstart(out: Path, total_tokens: int | None = None) -> str:
    """Prepare data, train the tiny model (or go on with it), judge it; returns the report as text."""
    if not (RECIPES / "data-tiny.yaml").is_file():
        raise UserError("recipes/data-tiny.yaml is not here: run quickstart in the repository's folder")
    data = recipes.load(DataRecipe, RECIPES / "data-tiny.yaml")
    data = prepare_what_there_is(data)
    overrides = ["--out", str(out), "--data.path", str(data.out)]
    if total_tokens is not None:
        overrides += ["--total_tokens", str(total_tokens)]
    recipe = recipes.load(PretrainRecipe, RECIPES / "pretrain-tiny.yaml", overrides)
    if not (out / "model").exists():
        pretrain(recipe, "auto")
    if not (out / "model").exists():
        return f"Stopped; the checkpoint is saved. Go on with: dsv3 quickstart --out {out}"
    return report(out, Path(data.out), recipe)


def prepare_what_there_is(data: DataRecipe) -> DataRecipe:
    """Fetch what the recipe fetches and prepare all of it; returns the recipe without what is out of reach.

    Without a network the standard library alone remains, and that is said.
    """
    sources = []
    for source in data.sources:
        if source.manifest is not None and source.folder is not None:
            try:
                fetch(source.manifest, source.folder)
            except UserError as error:
                print(f"no {source.name} this time, only the standard library: {error}")
                continue
        sources.append(source)
    found = data.model_copy(update={"sources": sources})
    prepare(found)
    return found


def report(out: Path, data: Path, recipe: PretrainRecipe) -> str:
    """Held-out bits per byte of each source beside two baselines, samples, and what to do next."""
    model = load(out / "model").eval()
    tokenizer = Tokenizer.load(out / "model")
    byte_lengths = torch.from_numpy(np.asarray(tokenizer.byte_lengths)).long()
    lines, results = ["", "Held-out text, bits per byte (less is better):"], {}
    lines.append(f"  {'source':<10} {'this model':>10} {'xz -9':>8} {'unigram':>8}   MTP acceptance")
    for folder in sorted(path for path in (data / "valid").iterdir() if path.is_dir()):
        shards = TokenShards(folder)
        loader = TokenLoader([(shards, 1.0)], recipe.sequence_length, 2)
        rows = loader.batch(0, min(128, loader.samples[0]))
        found = evaluate(model, rows, byte_lengths, recipe.sequence_length)
        read = rows.tokens_BT[:, 1 : recipe.sequence_length + 1]
        text = tokenizer.decode(read.flatten().tolist(), skip_special=True)
        fit = tokenizer.decode(TokenShards(data / "train" / folder.name).tokens(0, 300_000).tolist())
        held = text.encode()
        xz, unigram = xz_bits_per_byte(held), unigram_bits_per_byte(fit.encode(), held)
        accepted = ", ".join(f"{share:.0%}" for share in found.acceptance)
        lines.append(
            f"  {folder.name:<10} {found.bits_per_byte:>10.3f} {xz:>8.3f} {unigram:>8.3f}   {accepted}"
        )
        results[folder.name] = {
            "bits_per_byte": found.bits_per_byte,
            "xz_bits_per_byte": xz,
            "unigram_bits_per_byte": unigram,
            "mtp_acceptance": found.acceptance,
            "bytes": len(held),
        }
    write_json(out / "report.json", results)
    lines += ["", "Samples (temperature 0.7):"]
    for prompt in PROMPTS:
        text = complete(model, tokenizer, prompt, max_tokens=40, temperature=0.7)
        lines.append("  " + (prompt + "|" + text).replace("\n", "\n  "))
        lines.append("  " + "-" * 40)
    lines += ["Fill in the middle (what the model wrote stands between [[ and ]]):"]
    middle = complete(model, tokenizer, *HOLE, max_tokens=16)
    lines.append("  " + f"{HOLE[0]}[[{middle}]]{HOLE[1]}".replace("\n", "\n  ").rstrip())
    lines += [
        "",
        f"Pictures: {os.path.join(out, 'plots')}   numbers: {out / 'metrics.jsonl'}, {out / 'report.json'}",
        f"The model is a Hugging Face folder: {out / 'model'}",
        "",
        "Next:",
        f"  dsv3 generate {out / 'model'} --prompt 'class Stack:' --temperature 0.7",
        "  dsv3 pretrain recipes/pretrain-tiny.yaml --total_tokens 10e6   # a better model, in about an hour",
        "  dsv3 plan params v3-671b                                       # what the real one holds",
    ]
    return "\n".join(lines)
