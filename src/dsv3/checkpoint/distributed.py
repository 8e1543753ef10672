"""Training checkpoints of many processes: each rank writes what it updates (torch.distributed.checkpoint).

``checkpoints/step-000123/`` holds ``config.json``, ``tensors/`` (DCP's files: ``weight/NAME``,
``exp_avg/NAME`` and so on, NAME ours), ``trainer/state.json`` and ``MANIFEST.json``, as the one of a single
process does (``run.py``), and appears as one does: under its name only when it is whole and on disk. No rank
ever holds what others update. Read back, tensors come in any other cut, of one process too.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dsv3.checkpoint import names
from dsv3.checkpoint.errors import CheckpointError, DamagedCheckpoint, some, writing
from dsv3.checkpoint.fp8 import FP8
from dsv3.checkpoint.hf import config_json, write_rest
from dsv3.checkpoint.run import MANIFEST, OPTIMIZER, STATE
from dsv3.checkpoint.safetensors_io import METADATA, SafetensorsFile
from dsv3.checkpoint.safetensors_io import write as write_tensors
from dsv3.checkpoint.weights import Weights, shard_files
from dsv3.common.errors import UserError
from dsv3.common.files import TEMPORARY, fsync_folder, sha256, write_json
from dsv3.config.model import ModelConfig
from dsv3.ops.blocks import BLOCK, Quantised, dequantise
from dsv3.ops.formats import E4M3

TENSORS = "tensors"
LONGEST = 512  # bytes of what a rank tells the others of a failure


def is_distributed(folder: str | Path) -> bool:
    """Whether a checkpoint is one of many processes."""
    return (Path(folder) / TENSORS).is_dir()


def write(
    folder: str | Path,
    *,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    state: Mapping[str, Any],
    group: dist.ProcessGroup,
    tokenizer_files: Iterable[str | Path] = (),
) -> None:
    """Write a checkpoint; every rank of ``group`` (gloo) calls it with its own tensors.

    ``tensors``: on the CPU; DTensors where ranks have parts, plain ones where all have the same. The group
    must be used for nothing else meanwhile: a thread may write while the run goes on.
    """
    folder = Path(folder)
    temporary = folder.with_name(f"{TEMPORARY}all-{folder.name}")
    rank = dist.get_rank(group)
    with _together(group, folder, temporary):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # a killed writer's
            (temporary / "trainer").mkdir(parents=True)
    with _together(group, folder, temporary):
        storage = dcp.FileSystemWriter(temporary / TENSORS, sync_files=True)
        with _quiet():
            dcp.save(dict(tensors), storage_writer=storage, process_group=group)
    with _together(group, folder, temporary):
        own = sorted((temporary / TENSORS).glob(f"__{rank}_*"))
        listed = {f"{TENSORS}/{path.name}": _facts(path) for path in own}
        write_json(temporary / f"manifest-{rank}.json", listed)
    with _together(group, folder, temporary):
        if rank == 0:
            _finish(folder, temporary, config, state, tokenizer_files)


@contextmanager
def _together(group: dist.ProcessGroup, folder: Path, temporary: Path) -> Iterator[None]:
    """A part of a save that all ranks end together.

    What the disk of one refuses, all raise (:class:`CheckpointError`, naming the rank), and nothing of the
    save stays: no rank waits for one that has stopped, and what was saved before is as it was.
    """
    rank, said = dist.get_rank(group), ""
    try:
        with writing(folder):
            yield
    except CheckpointError as error:
        said = str(error)
    except CheckpointException as error:  # DCP's: every rank has it
        if rank in error.failures:
            said = _refusal(folder, error.failures[rank][0])
    told = torch.zeros(LONGEST, dtype=torch.uint8)
    text = said.encode()[:LONGEST]
    told[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    everyone = [torch.empty_like(told) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, told, group=group)
    for other, found in enumerate(everyone):
        if message := bytes(found.tolist()).rstrip(b"\0").decode(errors="ignore"):
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            failed = CheckpointError(f"rank {other}: {message}")
            failed.shared = True
            raise failed


def _refusal(folder: Path, cause: BaseException) -> str:
    """What DCP ran into, as a line."""
    if "inline_container" in str(cause):  # torch's writer of archives drops the system's own error
        cause = OSError(errno.ENOSPC, "the disk took less than it was given")
    try:
        with writing(folder):
            raise cause
    except Exception as error:
        return str(error).splitlines()[0]


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _finish(
    folder: Path,
    temporary: Path,
    config: ModelConfig,
    state: Mapping[str, Any],
    tokenizer_files: Iterable[str | Path],
) -> None:
    """What the first rank writes beside the tensors; then the folder gets its name."""
    write_json(temporary / "config.json", config_json(config, torch.float32))
    write_json(temporary / STATE, dict(state))
    for file in map(Path, tokenizer_files):
        shutil.copyfile(file, temporary / file.name)
    listed: dict[str, Any] = {}
    for part in sorted(temporary.glob("manifest-*.json")):
        listed.update(json.loads(part.read_text(encoding="utf-8")))
        part.unlink()
    for path in sorted(temporary.rglob("*")):
        name = str(path.relative_to(temporary))
        if path.is_file() and name not in listed:
            listed[name] = _facts(path)
    write_json(temporary / MANIFEST, {"files": listed})
    for path in [*temporary.rglob("*"), temporary]:
        fsync_folder(path)
    if folder.exists():  # a run that went back and came by again
        old = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    os.rename(temporary, folder)
    fsync_folder(folder.parent)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's remarks on one process and on its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def kinds(folder: str | Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a checkpoint of many processes, by name."""
    try:
        held = dcp.FileSystemReader(Path(folder) / TENSORS).read_metadata().state_dict_metadata
    except (OSError, EOFError, ValueError) as error:
        raise DamagedCheckpoint(f"{Path(folder) / TENSORS} cannot be read: {error}") from None
    return {
        name: (facts.properties.dtype, tuple(facts.size))
        for name, facts in held.items()
        if isinstance(facts, TensorStorageMetadata)
    }


def read(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` in place: DTensors in any cut, plain ones whole. All ranks call it together.

    Raises :class:`UserError` naming what the checkpoint does not hold in that dtype and shape.
    """
    held = kinds(folder)
    wrong = [
        f"{name} ({held.get(name, 'missing')}, the run's {tensor.dtype} {list(tensor.shape)})"
        for name, tensor in tensors.items()
        if held.get(name) != (tensor.dtype, tuple(tensor.shape))
    ]
    if wrong:
        raise UserError(f"{folder} does not fit the run: {some(wrong)}")
    with _quiet():
        dcp.load(
            dict(tensors),
            storage_reader=dcp.FileSystemReader(Path(folder) / TENSORS),
            no_dist=not dist.is_initialized(),
        )


def read_state(folder: str | Path) -> dict[str, Any]:
    """``trainer/state.json``."""
    path = Path(folder) / STATE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None


class Rows:
    """Rows of the tensors of a Hugging Face folder or a single process's checkpoint, under our names.

    The routed experts' files are one an expert: rows of the stack are looked up one by one, so that a rank
    reads the experts it was dealt and no others.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __enter__(self) -> Rows:
        self.weights = Weights(self.folder).__enter__()
        path = self.folder / OPTIMIZER
        self.optimizer = SafetensorsFile(path).__enter__() if path.exists() else None
        return self

    def __exit__(self, *_: object) -> None:
        self.weights.__exit__()
        if self.optimizer is not None:
            self.optimizer.__exit__(None, None, None)

    def weight(self, name: str, first: int, into: Tensor) -> None:
        """Rows of a parameter from ``first`` on, as many as ``into`` has; FP8 with its block scales."""
        if name in self.weights.entries:
            if self.weights.entries[name].dtype is FP8:
                self._fill_fp8(name, first, into)
            else:
                self._fill(self.weights.file_of(name), name, first, into)
            return
        head, _, tail = name.partition(".experts.")
        for row in range(len(into)):
            self.weight(f"{head}.experts.{first + row}.{tail}", 0, into[row])

    def state(self, name: str, first: int, into: Tensor) -> None:
        """The same of a tensor of the optimizer's (``exp_avg/NAME``)."""
        assert self.optimizer is not None
        self._fill(self.optimizer, name, first, into)

    def states(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of all that the optimizer and callbacks keep."""
        entries = {} if self.optimizer is None else self.optimizer.entries
        return {name: (entry.dtype, entry.shape) for name, entry in entries.items()}

    def state_dtype(self, name: str) -> torch.dtype | None:
        """How a tensor of the optimizer's is stored; None where there is none."""
        if self.optimizer is None or name not in self.optimizer.entries:
            return None
        return self.optimizer.entries[name].dtype

    @torch.no_grad()
    def _fill_fp8(self, name: str, first: int, into: Tensor) -> None:
        if not len(into):
            return
        last, top = first + len(into), first - first % BLOCK.rows
        values = self.weights.rows(name, top, last)
        scales = self.weights.rows(names.scale_name(name), top // BLOCK.rows, -(-last // BLOCK.rows)).float()
        into.copy_(dequantise(Quantised(values, scales, values.shape, BLOCK, E4M3))[first - top :])

    @staticmethod
    @torch.no_grad()
    def _fill(file: SafetensorsFile, name: str, first: int, into: Tensor) -> None:
        width = into[0].numel() if into.dim() and len(into) else 1
        if into.numel():
            into.copy_(file.part(name, first * width, into.numel()).view(into.shape))


def export(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    group: dist.ProcessGroup,
    tokenizer_files: Iterable[str | Path] = (),
) -> None:
    """Write a Hugging Face folder, a file a rank; every rank of ``group`` calls it.

    ``tensors``: what this rank writes, by file names; every tensor of the model on exactly one rank.
    ``folder`` must be new; it appears when all is written.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    temporary = folder.with_name(f"{TEMPORARY}all-{folder.name}")
    with _together(group, folder, temporary):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    own = dict(tensors)  # ranks gather them together
    with _together(group, folder, temporary):
        if own:
            write_tensors(temporary / f"part-{rank}", own, metadata=METADATA)
        where = {name: tensor.nbytes for name, tensor in own.items()}
        write_json(temporary / f"part-{rank}.json", where)
    with _together(group, folder, temporary):
        if rank == 0:
            _assemble(folder, temporary, ranks, config, tokenizer_files)


def _assemble(
    folder: Path, temporary: Path, ranks: int, config: ModelConfig, tokenizer_files: Iterable[str | Path]
) -> None:
    """What the first rank does when all have written their files: names, index, the rest of the folder."""
    held = {r: json.loads((temporary / f"part-{r}.json").read_text()) for r in range(ranks)}
    wrote = [r for r in range(ranks) if held[r]]
    index: dict[str, str] = {}
    for file, r in zip(shard_files(len(wrote)), wrote):
        os.rename(temporary / f"part-{r}", temporary / file)
        index.update(dict.fromkeys(held[r], file))
    for r in range(ranks):
        (temporary / f"part-{r}.json").unlink()
    total = sum(sum(sizes.values()) for sizes in held.values())
    write_rest(temporary, config, torch.float32, None, index, total)
    for path in map(Path, tokenizer_files):
        shutil.copyfile(path, temporary / path.name)
    for path in [*temporary.rglob("*"), temporary]:
        fsync_folder(path)
    os.rename(temporary, folder)
    fsync_folder(folder.parent)


def file_names(
    name: str, tensor: Tensor, first_expert: int, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """A parameter of ours under its names in the files: with the repeats of MTP layers, experts one by one.

    ``tensor`` may hold some of the experts, from ``first_expert`` on.
    """
    if ".mlp.experts." in name:
        head, _, tail = name.partition(".experts.")
        for row, weight in enumerate(tensor.unbind()):
            yield f"{head}.experts.{first_expert + row}.{tail}", weight
        return
    yield name, tensor
    for copy, original in names.mtp_repeats(config).items():
        if original == name:
            yield copy, tensor
