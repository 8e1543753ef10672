"""llama.cpp as a peer: its files made by its own converter, its speed told by its own benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsv3.common.errors import Failure, UserError

BENCH, QUANTIZE, CONVERTER = "llama-batched-bench", "llama-quantize", "convert_hf_to_gguf.py"
TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # what stands against our formats
CELLS = 256  # a sequence's cache is a multiple of that


def program(folder: Path, name: str) -> Path:
    """A program in llama.cpp's folder, or where its build puts it."""
    for place in (folder, folder / "bin", folder / "build" / "bin"):
        if os.access(place / name, os.X_OK):
            return place / name
    raise UserError(f"--llama-cpp ({folder}) has no {name}, neither in it nor in build/bin; build it there")


def gguf(llama: Path, model: Path, kind: str) -> Path:
    """The model's file of this format, beside its folder; made there if it is not."""
    path = model.with_name(f"{model.name}-{TYPES[kind].lower()}.gguf")
    if path.is_file():
        return path
    partial = path.with_suffix(".partial")
    if kind == "bf16":
        converter = llama / CONVERTER
        if not converter.is_file():
            raise UserError(f"{path} does not exist and --llama-cpp ({llama}) has no {CONVERTER} to make it")
        if not (model / "tokenizer.json").is_file():
            raise UserError(f"{model} has no tokenizer, which {CONVERTER} needs; make it with --tokenizer")
        _done([sys.executable, str(converter), str(model), "--outtype", "bf16", "--outfile", str(partial)])
    else:
        source, quantize = gguf(llama, model, "bf16"), program(llama, QUANTIZE)
        _done([str(quantize), str(source), str(partial), TYPES[kind]])
    partial.replace(path)
    return path


def measure(
    bench: Path, file: Path, prompt_tokens: int, tokens: int, batches: tuple[int, ...], threads: int
) -> dict[str, Any]:
    """Tokens a second for each batch. Its first figures pay for mapping the file, and are thrown away."""
    room = -(-(prompt_tokens + tokens) // CELLS) * CELLS * max(batches)
    text = _done(
        [
            str(bench), "-m", str(file), "-c", str(room), "-t", str(threads),
            "-npp", str(prompt_tokens), "-ntg", str(tokens),
            "-npl", ",".join(map(str, (batches[0], *batches))), "--output-format", "jsonl",
        ]
    )  # fmt: skip
    return parse(text, batches)


def parse(text: str, batches: tuple[int, ...]) -> dict[str, Any]:
    """The last figures of every batch among the lines of its output, and what it says of its settings."""
    found, settings = {}, {}
    for line in text.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            found[str(row["pl"])] = {"prefill": row["speed_pp"], "decode": row["speed_tg"]}
            settings = {name: row[name] for name in ("n_batch", "n_ubatch", "flash_attn") if name in row}
    if absent := [batch for batch in batches if str(batch) not in found]:
        raise Failure(f"{BENCH} gave no figures for batch {', '.join(map(str, absent))}")
    return {"batches": found, **settings}


def _done(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Failure(f"{Path(command[0]).name} stopped: {lines[-1] if lines else 'no message'}")
    return done.stdout
