"""The tensors of a Hugging Face folder: found, checked against a model, and read, tensor by tensor.

What does not fit is refused, with names, from the files' headers, before any memory is taken.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint import fp8, names
from dsv3.checkpoint.errors import some
from dsv3.checkpoint.fp8 import FP8
from dsv3.checkpoint.safetensors_io import Entry, Kind, SafetensorsFile
from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shard_files(count: int) -> list[str]:
    """The customary names of so many files with weights."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


class Weights:
    """The tensors of a folder: ``entries`` by file name over all shards, checked against a model, read."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self._files: dict[str, SafetensorsFile] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Weights:
        try:
            self._open_all()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _open_all(self) -> None:
        listed = self._listed()
        for shard in dict.fromkeys(listed.values()):
            file = self._open.enter_context(SafetensorsFile(self.folder / shard))
            for name, entry in file.entries.items():
                if listed.get(name, shard) != shard or names.ignored(name):
                    continue  # the index says it is in another shard
                self.entries[name], self._files[name] = entry, file
        lost = [name for name in listed if name and name not in self.entries and not names.ignored(name)]
        if lost:
            raise UserError(f"{self.folder}: {INDEX} lists {some(lost)}, but the shards do not hold them")

    def _listed(self) -> dict[str, str]:
        """Tensor to shard, from the index; of a folder with one file, that file under an empty name."""
        if (self.folder / SINGLE).is_file():
            return {"": SINGLE}
        path = self.folder / INDEX
        if not path.is_file():
            pickled = any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt"))
            why = "; pickled weights (.bin, .pt) are not read, convert them to safetensors" if pickled else ""
            raise UserError(f"{self.folder} holds neither {SINGLE} nor {INDEX}{why}")
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(listed.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is damaged: it needs a weight_map of tensor to file name") from None
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise UserError(f"{path} points to {shard!r}; shards must be plain file names in its folder")
            if not (self.folder / shard).is_file():
                raise UserError(f"{self.folder}: shard {shard} is missing, {INDEX} lists it; fetch it again")
        return listed

    def check(self, model: DeepSeekV3) -> None:
        """Refuse the folder, with names, unless its tensors are exactly the model's (repeats may miss)."""
        wanted = dict(names.hf_tensors(model))
        shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        for copy, original in names.mtp_repeats(model.config).items():
            if copy in self.entries:
                shapes[copy] = shapes[original]
        for name, entry in self.entries.items():
            if entry.dtype is FP8 and name in shapes:
                shapes[names.scale_name(name)] = fp8.scale_shape(shapes[name])
        self._fit(shapes)
        odd = [
            f"{name} ({entry.dtype})"
            for name, entry in self.entries.items()
            if entry.dtype not in (*FLOATS.values(), FP8) or (entry.dtype is FP8 and len(entry.shape) != 2)
        ]
        if odd:
            raise UserError(
                f"{self.folder}: {some(odd)} must be FP32, BF16 or FP16, or FP8 with block scales"
            )

    def check_packed(self, model: DeepSeekV3) -> None:
        """Refuse the folder, with names, unless its tensors are exactly those of a packed model."""
        state = model.state_dict()
        self._fit({name: tuple(tensor.shape) for name, tensor in state.items()})
        fixed = {name for name, _ in model.named_buffers()}
        odd = [
            f"{name} ({entry.dtype})"
            for name, entry in self.entries.items()
            if entry.dtype not in ([state[name].dtype] if name in fixed else FLOATS.values())
        ]
        if odd:
            raise UserError(f"{self.folder}: {some(odd)} have another number format than config.json says")

    def _fit(self, shapes: dict[str, tuple[int, ...]]) -> None:
        missing = [name for name in shapes if name not in self.entries]
        extra = [name for name in self.entries if name not in shapes]
        wrong = [
            f"{name} is {list(self.entries[name].shape)}, config.json makes it {list(shape)}"
            for name, shape in shapes.items()
            if name in self.entries and self.entries[name].shape != shape
        ]
        faults = []
        if missing:
            faults.append(f"{len(missing)} missing ({some(missing)})")
        if extra:
            faults.append(f"{len(extra)} unexpected ({some(extra)})")
        if wrong:
            faults.append(f"{len(wrong)} misshapen ({some(wrong)})")
        if faults:
            raise UserError(f"{self.folder}: the tensors do not fit config.json: {'; '.join(faults)}")

    def dtypes(self, model: DeepSeekV3, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """The dtype of each of the model's tensors, by our name: ``dtype``, or as stored (frozen: FP8)."""
        found: dict[str, torch.dtype] = {}
        for name, tensor in names.hf_tensors(model):
            if tensor.dtype is FP8 or names.is_scale(name):
                kind = tensor.dtype
            elif names.always_fp32(name):
                kind = torch.float32
            else:
                stored = self.entries[name].dtype
                kind = dtype or (torch.bfloat16 if stored is FP8 else stored)
            ours = names.our_name(name)
            found[ours] = torch.promote_types(found.get(ours, kind), kind)  # experts may differ
        return found

    def kind(self, name: str) -> Kind:
        """A tensor's dtype and shape as stored."""
        return self.entries[name].dtype, self.entries[name].shape

    def in_order(self) -> list[str]:
        """Names of all tensors but scales, in the order of the files."""
        weights = [name for name in self.entries if not names.is_scale(name)]
        return sorted(weights, key=lambda name: (self._files[name].path, self.entries[name].start))

    def state(self) -> dict[str, list[int]]:
        """Size in bytes and time of the last change, in nanoseconds, of every file that is there now."""
        paths = sorted({file.path for file in self._files.values()})
        found = {path.name: path.stat() for path in paths if path.exists()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}

    def file_of(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor."""
        return self._files[name]

    def mapped(self, name: str) -> Tensor:
        """A tensor where it lies in its file (:meth:`SafetensorsFile.mapped`)."""
        return self._files[name].mapped(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor as stored, ``first`` to before ``last``: ``[R, width]``; any thread may ask."""
        width = fp8.width(self.entries[name].shape)
        return self._files[name].part(name, first * width, (last - first) * width).view(-1, width)

    @torch.no_grad()
    def fill(self, model: DeepSeekV3) -> None:
        """Read every tensor into the model's memory, in the order of the files; frozen modules get FP8."""
        wanted = dict(names.hf_tensors(model))

        def put(name: str, first: int, piece: Tensor) -> None:
            wanted[name].view(-1)[first : first + piece.numel()].copy_(piece.view(-1))

        for name in self.in_order():
            if name not in wanted:
                continue  # an MTP layer's copy
            into = wanted[name]
            if FP8 in (self.entries[name].dtype, into.dtype):
                fp8.translate(name, self.kind(name), into.dtype, self.rows, put)
            else:
                self._files[name].read(name, into)

    def differing_repeats(self, config: ModelConfig) -> list[str]:
        """Names of the MTP layers' copies of embedding and head whose values are not the main model's."""

        def bands(name: str) -> Iterator[Tensor]:
            return (x.float() for _, _, x in fp8.read(name, self.kind(name), self.rows))

        return [
            copy
            for copy, original in names.mtp_repeats(config).items()
            if copy in self.entries and not all(map(torch.equal, bands(copy), bands(original)))
        ]
