"""``dsv3 convert``: a Hugging Face folder in another number format, by threads, surviving a kill (3.3).

In FP8, BF16 or FP32 every file of the source becomes a file of the same name; INT8 and INT4 have a layout of
their own (:mod:`dsv3.checkpoint.integers`).

Memory: no tensor is read whole. A worker holds a band of a tensor's rows (:data:`dsv3.checkpoint.fp8.BAND`
numbers, or 128 rows where that is more) as stored, as FP32 and as written: at most 16 bytes a number, so 4
MiB a worker, 36 MiB where a matrix is 18,432 wide; twice that for INT8 and INT4. Beside that the names and
places of all tensors, about 4 KB each.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv3.checkpoint import fp8, hf, integers, names
from dsv3.checkpoint.errors import CheckpointError
from dsv3.checkpoint.fp8 import FP8
from dsv3.checkpoint.safetensors_io import Kind, nbytes
from dsv3.checkpoint.stream import Shard, Task, refuse_target, write_folder
from dsv3.checkpoint.weights import Weights
from dsv3.common.errors import UserError, nearest
from dsv3.common.files import sha256, write_atomic
from dsv3.model import DeepSeekV3

FORMATS = {"fp8": FP8, "bf16": torch.bfloat16, "fp32": torch.float32}
SCALE_FORMATS = ("float", "ue8m0")
MADE_BY = (
    "dsv3-convert/1"  # another number when the same source gives other bytes: then nothing is gone on with
)


@dataclass(frozen=True)
class Result:
    """What a conversion came to. Bytes of tensors read and written by this call, in ``seconds``.

    ``ue8m0_source``: the source's scales are powers of two.
    """

    folder: Path
    files: int
    read_bytes: int
    written_bytes: int
    seconds: float
    ue8m0_source: bool


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    scale_format: str = "float",
    workers: int = 2,
    group: int | None = None,
) -> Result:
    """Write ``target``, a new folder, from ``source`` in another format: fp8, bf16, fp32, int8 or int4.

    fp8 is the released layout: the layers' matrices are FP8, the other weights BF16, the experts' biases
    FP32, as in bf16 too. ``scale_format`` ue8m0: new scales are powers of two, as in V3.1. ``group``: inputs
    of an INT4 group, 32, 64 or 128 (None). A call that was killed is continued by the same call, to the same
    bytes; where the source or what is asked has changed since, it starts again.

    Raises :class:`UserError` before any work for a source that is not whole, is in ``to`` already or in INT8
    or INT4, a target that exists or too little room; :class:`CheckpointError` for a disk that gets full and
    for a source that changes under way.
    """
    started = time.monotonic()
    source, target = Path(source), Path(target)
    _check(source, target, to, scale_format, workers)
    into = integers.wanted(to, group) if group is not None or to in integers.FORMATS else None
    config, stored = hf.read_config(source), hf.stored_integers(source)
    if stored:
        raise UserError(
            f"{source} is in int{stored.bits}, which lost what {to} may need; convert the original"
        )
    ue8m0_source = hf.stored_quantization(source).get("scale_fmt") == "ue8m0"
    ue8m0 = ue8m0_source or scale_format == "ue8m0"
    with Weights(source) as weights:
        model = hf.bare_model(config, weights)
        config = model.config
        quantization: dict[str, Any] | None = None
        if into:
            hf.warn_of_repeats(weights, config)
            shards, dtype = integers.plan(model, weights, into), torch.bfloat16
            quantization = integers.quantization_config(into)
        else:
            dtypes = dtypes_in(model, weights.in_order(), to)
            anew = to == "fp8" and ue8m0 and not ue8m0_source
            if not anew and all(weights.kind(name)[0] is kind for name, kind in dtypes.items()):
                raise UserError(f"{source} is in {to} already; choose another --to, or copy it")
            files: dict[str, list[str]] = {}
            for name in dtypes:
                files.setdefault(weights.file_of(name).path.name, []).append(name)
            shards = plan(files, dtypes, weights, ue8m0, anew)
            dtype = dtypes["lm_head.weight"]
            quantization = fp8.quantization_config(ue8m0) if to == "fp8" else None
        job = {
            "made_by": MADE_BY, "to": quantization if into else to, "ue8m0": ue8m0,
            "source": weights.state(), "config": sha256(source / "config.json"),
        }  # fmt: skip

        def unchanged() -> None:
            if weights.state() != job["source"]:
                raise CheckpointError(
                    f"{weights.folder} changed while it was read; run the same command again"
                )

        def finish(folder: Path) -> None:
            where = {name: shard.file for shard in shards for name in shard.kinds}
            total = sum(shard.nbytes for shard in shards)
            hf.write_rest(folder, config, dtype, quantization, where, total)
            for name in (*hf.TOKENIZER_FILES, "generation_config.json"):
                if (source / name).is_file():
                    write_atomic(folder / name, (source / name).read_bytes())

        left = write_folder(target, job, "convert", shards, workers, finish, unchanged)
    read = sum(task.reads for shard in left for task in shard.tasks)
    written = sum(shard.nbytes for shard in left)
    return Result(target, len(shards), read, written, time.monotonic() - started, ue8m0_source)


def dtypes_in(model: DeepSeekV3, file_names: list[str], to: str) -> dict[str, torch.dtype]:
    """What each weight of a folder is in fp8, bf16 or fp32, in the order given."""
    in_fp8 = names.quantised(model) if to == "fp8" else set()
    other = torch.bfloat16 if to == "fp8" else FORMATS[to]
    return {
        name: FP8 if name in in_fp8 else torch.float32 if names.always_fp32(name) else other
        for name in file_names
    }


def plan(
    files: dict[str, list[str]],
    dtypes: dict[str, torch.dtype],
    source: integers.Source,
    ue8m0: bool = False,
    anew: bool = False,
) -> list[Shard]:
    """The files to write, given the weights of each; of the source, one that only held scales is no more."""
    shards = []
    for file, weights in files.items():
        made: dict[str, Kind] = {}
        tasks = []
        for name in weights:
            kind = source.kind(name)
            made.update(fp8.outputs(name, kind[1], dtypes[name]))
            make = partial(fp8.translate, name, kind, dtypes[name], source.rows, ue8m0=ue8m0, anew=anew)
            tasks.append(Task(make, nbytes(kind)))
        shards.append(Shard(file, made, tasks))
    return shards


def _check(source: Path, target: Path, to: str, scale_format: str, workers: int) -> None:
    formats = [*FORMATS, *integers.FORMATS]
    for option, value, known in (("--to", to, formats), ("--scale-format", scale_format, SCALE_FORMATS)):
        if value not in known:
            raise UserError(
                f"{option} ({value}) is unknown{nearest(value, known)}; there are {', '.join(known)}"
            )
    if scale_format == "ue8m0" and to != "fp8":
        raise UserError(f"--scale-format (ue8m0) is for --to fp8; {to} has no such scales")
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give the local folder of a Hugging Face checkpoint")
    refuse_target(target, workers)
