"""Training checkpoints: a Hugging Face folder with the optimizer beside it, and a manifest of hashes.

``checkpoints/step-000123/`` holds ``config.json``, ``model.safetensors`` (so that every checkpoint opens with
:func:`dsv3.load` and with transformers), ``trainer/optimizer.safetensors``, ``trainer/state.json``, and
``MANIFEST.json`` with the size and SHA-256 of every file. A folder appears under its name only when it is
whole and on disk; everything else is called ``.tmp-*``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv3.checkpoint import names
from dsv3.checkpoint.errors import CheckpointError, DamagedCheckpoint, some, writing
from dsv3.checkpoint.hf import save_into
from dsv3.checkpoint.safetensors_io import SafetensorsFile
from dsv3.checkpoint.safetensors_io import write as write_tensors
from dsv3.checkpoint.weights import Weights
from dsv3.common.errors import UserError
from dsv3.common.files import TEMPORARY, fsync_folder, new_folder, sha256, write_json
from dsv3.model import DeepSeekV3

__all__ = [
    "CheckpointError", "DamagedCheckpoint", "keep_last", "latest", "read_into", "step_folder", "steps",
    "verify", "write",
]  # fmt: skip

MANIFEST = "MANIFEST.json"
OPTIMIZER = "trainer/optimizer.safetensors"
STATE = "trainer/state.json"
SHARED = "tensors/.metadata"  # of a checkpoint of many processes (distributed.py)
_STEP = re.compile(r"step-(\d{6,})")


def step_folder(checkpoints: str | Path, step: int) -> Path:
    """The folder of a step: ``step-000123``."""
    return Path(checkpoints) / f"step-{step:06d}"


def steps(checkpoints: str | Path) -> list[Path]:
    """The folders of all steps, newest first, sound or not."""
    folder = Path(checkpoints)
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    numbered = [(int(match[1]), path) for path in found if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def write(
    folder: str | Path,
    *,
    model: DeepSeekV3,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer_files: Iterable[str | Path] = (),
) -> None:
    """Write a checkpoint; ``tensors`` is the optimizer's state, ``state`` plain JSON data.

    A folder of the same name (a run that went back and came by again) stays until the new one is whole, and
    then gives way. Raises :class:`CheckpointError` when the disk is full; what was there before is untouched
    and nothing half written remains.
    """
    folder = Path(folder)
    target = folder
    if folder.exists():
        target = folder.with_name(f"{TEMPORARY}new-{folder.name}")
        shutil.rmtree(target, ignore_errors=True)  # a killed writer's
    with writing(folder):
        with new_folder(target) as temporary:
            digests = save_into(model, temporary, tokenizer_files=tokenizer_files)
            (temporary / "trainer").mkdir()
            digests[OPTIMIZER] = write_tensors(temporary / OPTIMIZER, tensors)
            write_json(temporary / STATE, dict(state))
            files = {
                str(path.relative_to(temporary)): path
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            listed = {
                name: {"bytes": path.stat().st_size, "sha256": digests.get(name) or sha256(path)}
                for name, path in files.items()
            }
            write_json(temporary / MANIFEST, {"files": listed})
        if target != folder:
            old = _aside(folder)
            os.rename(target, folder)
            fsync_folder(folder.parent)
            shutil.rmtree(old, ignore_errors=True)


def verify(folder: str | Path) -> None:
    """Read every file and compare it with the manifest; raises :class:`DamagedCheckpoint` naming one."""
    folder = Path(folder)
    for name, facts in _check_sizes(folder).items():
        try:
            sound = sha256(folder / name) == facts["sha256"]
        except OSError as error:  # a dying disk refuses to give what it holds
            raise DamagedCheckpoint(f"{folder / name} cannot be read: {error.strerror}") from None
        if not sound:
            raise DamagedCheckpoint(f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}")


def latest(checkpoints: str | Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint (None without any), and a line for each newer one that is damaged."""
    damaged = []
    for folder in steps(checkpoints):
        try:
            verify(folder)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        else:
            return folder, damaged
    return None, damaged


def read_into(folder: str | Path, model: DeepSeekV3) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint's weights into a model in place, bit for bit; returns ``(tensors, state)``.

    Does not hash the files (:func:`latest` and :func:`verify` do). Raises :class:`UserError` naming tensors
    that do not fit the model, before any is touched.
    """
    folder = Path(folder)
    with Weights(folder) as weights, SafetensorsFile(folder / OPTIMIZER) as optimizer:
        weights.check(model)
        other = [
            f"{name} ({weights.entries[name].dtype}, the model's {tensor.dtype})"
            for name, tensor in names.hf_tensors(model)
            if weights.entries[name].dtype != tensor.dtype
        ]
        if other:
            raise UserError(f"{folder}: resuming would round {some(other)}; load it with dsv3.load instead")
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{folder / STATE} cannot be read: {error}") from None
        tensors = {name: optimizer.read(name) for name in optimizer.entries}
        weights.fill(model)
    return tensors, state


def keep_last(checkpoints: str | Path, count: int) -> None:
    """Delete all but the newest ``count`` checkpoints, and what killed writers left behind.

    For the run's only writer, between writes. Folders whose sizes do not match their manifest are not
    counted, so that damage never costs the last good one. A folder loses its name before its files: a
    deletion that is interrupted leaves a ``.tmp-*`` and nothing that looks like a checkpoint.
    """
    if count < 1:
        raise UserError(f"the number of checkpoints to keep ({count}) must be at least 1")
    kept = 0
    with writing(Path(checkpoints)):
        for folder in steps(checkpoints):
            if kept >= count:
                _aside(folder)
            elif _sound_sizes(folder):
                kept += 1
    for left in Path(checkpoints).glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _aside(folder: Path) -> Path:
    """Take a checkpoint's name away, on disk too, before it is deleted."""
    aside = folder.with_name(f"{TEMPORARY}old-{os.getpid()}-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    fsync_folder(folder.parent)
    return aside


def _sound_sizes(folder: Path) -> bool:
    try:
        _check_sizes(folder)
    except DamagedCheckpoint:
        return False
    return True


def _check_sizes(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, all of which are there and as long as it says."""
    manifest = folder / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        sizes = {name: (facts["bytes"], facts["sha256"])[0] for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{manifest} is missing or damaged ({type(error).__name__})") from None
    if not {STATE, "config.json"} <= set(files) or not {OPTIMIZER, SHARED} & set(files):
        raise DamagedCheckpoint(f"{manifest} does not list a whole checkpoint")
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing, {MANIFEST} lists it")
        if path.stat().st_size != size:
            raise DamagedCheckpoint(f"{path} is damaged: {path.stat().st_size} bytes, not {size}")
    return files
