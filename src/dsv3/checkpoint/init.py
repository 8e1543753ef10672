"""``dsv3 init``: a model's folder with random weights, written as they are drawn, never whole in memory.

To try what a model of some size takes, and to begin training from a folder. Weights are drawn as
:class:`dsv3.model.DeepSeekV3` draws its own (report 4.2), but every band of rows from a generator of its own,
seeded by seed, name and row: the same weights in any number format, by any number of threads, after any kill.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint import fp8, hf, integers, names
from dsv3.checkpoint.convert import FORMATS, dtypes_in, plan
from dsv3.checkpoint.safetensors_io import Kind, nbytes
from dsv3.checkpoint.stream import refuse_target, write_folder
from dsv3.checkpoint.weights import shard_files
from dsv3.common.errors import UserError, nearest
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3

MADE_BY = "dsv3-init/1"  # another number when the same seed gives other bytes
SHARD = 5 * 2**30  # bytes


@dataclass(frozen=True)
class Made:
    """What was written: parameters in the files, and bytes of tensors written by this call in ``seconds``."""

    folder: Path
    parameters: int
    written_bytes: int
    seconds: float


class Drawn:
    """Initial weights by file name: any band of rows at any time, FP32."""

    def __init__(self, model: DeepSeekV3, seed: int):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in names.hf_tensors(model)}
        self.copies = names.mtp_repeats(model.config)
        self.shapes.update({copy: self.shapes[original] for copy, original in self.copies.items()})
        self.seed, self.spread = seed, model.config.initializer_range

    def kind(self, name: str) -> Kind:
        """FP32 and the shape."""
        return torch.float32, self.shapes[name]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor ``[R, width]``: norms one, selection biases zero, the rest from N(0, spread)."""
        shape = self.shapes[name]
        out = torch.empty(last - first, fp8.width(shape), dtype=torch.float32, device="cpu")
        if len(shape) == 1:
            return out.fill_(0.0 if names.always_fp32(name) else 1.0)
        text = f"{self.seed} {self.copies.get(name, name)} {first}"
        digest = hashlib.sha256(text.encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
        return out.normal_(0.0, self.spread, generator=generator)


def init(
    config: ModelConfig,
    folder: str | Path,
    to: str = "bf16",
    seed: int = 0,
    tokenizer: str | Path | None = None,
    group: int | None = None,
    workers: int = 2,
) -> Made:
    """Write ``folder``, new, with a model of random weights in ``to``: bf16, fp32, fp8, int8 or int4.

    What is written is what :func:`dsv3.checkpoint.convert.convert` makes of the same seed's ``fp32``.
    ``tokenizer``: a folder whose tokenizer goes along. ``group``: as for ``convert``. A call that was killed
    is continued by the same call. Memory as for ``convert``; raises as it does.
    """
    started = time.monotonic()
    folder = Path(folder)
    formats = [*FORMATS, *integers.FORMATS]
    if to not in formats:
        raise UserError(f"--to ({to}) is unknown{nearest(to, formats)}; there are {', '.join(formats)}")
    into = integers.wanted(to, group) if group is not None or to in integers.FORMATS else None
    copied = hf.tokenizer_files(tokenizer) if tokenizer is not None else []
    if tokenizer is not None and not copied:
        raise UserError(f"--tokenizer ({tokenizer}) holds no tokenizer.json; give the folder of one")
    refuse_target(folder, workers)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    source = Drawn(model, seed)
    quantization: dict[str, Any] | None
    if into:
        shards, dtype = integers.plan(model, source, into), torch.bfloat16
        quantization = integers.quantization_config(into)
    else:
        dtypes = dtypes_in(model, list(source.shapes), to)
        sizes = {
            name: sum(map(nbytes, fp8.outputs(name, source.shapes[name], kind).values()))
            for name, kind in dtypes.items()
        }
        cut = hf.cut_into_shards(sizes, SHARD)
        shards = plan(dict(zip(shard_files(len(cut)), cut)), dtypes, source)
        dtype, quantization = (
            dtypes["lm_head.weight"],
            fp8.quantization_config(False) if to == "fp8" else None,
        )
    where = {name: shard.file for shard in shards for name in shard.kinds}

    def finish(temporary: Path) -> None:
        total = sum(shard.nbytes for shard in shards)
        hf.write_rest(temporary, config, dtype, quantization, where, total)
        for path in copied:
            shutil.copyfile(path, temporary / path.name)

    job = {"made_by": MADE_BY, "to": quantization or to, "seed": seed, "config": config.to_dict()}
    left = write_folder(folder, job, "init", shards, workers, finish)
    parameters = sum(torch.Size(source.shapes[name]).numel() for name in source.shapes)
    written = sum(shard.nbytes for shard in left)
    return Made(folder, parameters, written, time.monotonic() - started)
