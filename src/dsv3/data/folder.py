"""The folder ``data prepare`` writes: what it was prepared from, and whether it may be written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.common.errors import UserError
from dsv3.common.files import sha256
from dsv3.common.progress import human
from dsv3.config.data import DataRecipe
from dsv3.data.sources import Part
from dsv3.data.writable import writable

FORMAT = "dsv3-data/1"
DISK = 2.5  # bytes on disk for a byte of text: the spill file, the tokens (4 for about 3.5), a margin


def state_of(recipe: DataRecipe, parts: list[Part]) -> dict[str, Any]:
    """What decides the result, to tell whether a folder was prepared from the same things."""
    content = recipe.model_dump(mode="json", exclude={"out", "workers"})
    for source in content["sources"]:
        del source["weight"]  # read by the trainer, not part of the shards
    path = recipe.tokenizer.path
    if path is not None:
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        content["tokenizer"] = {"sha256": sha256(file)}
    content["decontaminate"] = [f"{path} {sha256(path)}" for path in recipe.decontaminate]
    inputs = hashlib.sha256()
    for part in parts:
        for path, origin in part.files:
            inputs.update(f"{part.source} {origin} {os.path.getsize(path)}\n".encode())
    return {
        "format": FORMAT,
        "recipe": content,
        "input_files": sum(len(part.files) for part in parts),
        "input_bytes": sum(part.size for part in parts),
        "inputs_sha256": inputs.hexdigest(),
    }


def _difference(was: Any, now: Any, key: str = "") -> str | None:
    """The first key in which two plain structures differ, with both values; None if they are equal."""
    if was == now:
        return None
    if isinstance(was, dict) and isinstance(now, dict):
        for name in [*now, *was]:
            found = _difference(was.get(name), now.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for place, (a, b) in enumerate(zip(was, now)):
            found = _difference(a, b, f"{key}.{place}")
            if found:
                return found
    return f"{key} {json.dumps(was, ensure_ascii=False)}, now {json.dumps(now, ensure_ascii=False)}"


def check_out(out: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished folder, None for one to begin or go on with; refuses any other folder."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"out ({out}) is not a folder: choose another out")
    made = {str(entry.relative_to(out)) for entry in (*out.iterdir(), *(out / "work").glob("*"))}
    if made - {".lock"} == {"work", "work/plan.json"}:  # stopped at a bad row, say, that has been mended
        return None
    for file in (out / "manifest.json", out / "work" / "plan.json"):
        if not file.is_file():
            continue
        try:
            was = json.loads(file.read_text(encoding="utf-8"))
            different = _difference(was["recipe"], state["recipe"])
            same_inputs = was["inputs_sha256"] == state["inputs_sha256"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"out ({out}): {file} is damaged: delete the folder or choose another out"
            ) from None
        if different:
            raise UserError(
                f"out ({out}) was prepared with another recipe (it had {different}):"
                " choose another out or delete the folder"
            )
        if not same_inputs:
            raise UserError(
                f"out ({out}) was prepared from other text ({was['input_files']} files, {was['input_bytes']}"
                f" bytes; now {state['input_files']} files, {state['input_bytes']} bytes):"
                " choose another out or delete the folder"
            )
        return was if file.name == "manifest.json" else None
    if any(entry.name != ".lock" for entry in out.iterdir()):
        raise UserError(
            f"out ({out}) is not empty and was not written by dsv3 data prepare: choose another out"
        )
    return None


def check_disk(out: Path, parts: list[Part]) -> None:
    """Refuse to begin when the disk has less room than the shards and their drafts will take."""
    existing = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    needed = int(DISK * sum(part.text_bytes for part in parts))
    if needed > free:
        raise UserError(f"out ({out}) needs about {human(needed)}B, the disk has {human(free)}B free")


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep a second preparation out of the folder; the lock goes when the process does."""
    with open(writable(out, "out") / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"out ({out}) is being written by another dsv3 data prepare: wait for it"
            ) from None
        yield
