"""Folders of a packed model: INT8 or INT4, made tensor by tensor, mapped into memory instead of read.

The layout is our own. ``config.json`` says ``"quantization_config": {"quant_method": "dsv3", "layout": 2,
"bits": 8}``, or ``"bits": 4`` with ``"group_size"``; and ``"model_type": "dsv3_packed"``, so that other
readers refuse it: transformers would skip a ``quant_method`` it does not know and take the numbers for
weights. Tensors bear the names of the packed model's own state (:mod:`dsv3.quant.packed`), so every one of
them is a tensor of the model as it lies in the file:

* ``X.weight`` of a matrix: uint8 ``[B, I / 4, 16, 4]``, a block of 16 outputs after the other, with a number
  a byte in the order of :class:`dsv3.ops.integers.Int8`; or ``[B, I / 8, 16, 4]``, two a byte, of ``Int4``.
  ``X.weight_scale``: FP32 ``[B, 16]``, or ``[B, G, 16]`` for G groups of inputs; ``X.weight_least``: FP32
  ``[B, G, 16]``, INT4 only. In an INT4 folder head and ``kv_b_proj`` are INT8.
* routed experts are stacked: ``model.layers.N.mlp.experts.gate_proj.weight [E, B, I / 4, 16, 4]``, their
  scales too.
* the embedding is BF16, selection biases FP32, gates and norms have the dtype of the source.
* embedding and head are not repeated in MTP layers.

A layer is a file, and so are embedding and head, wide numbers first in each: all tensors are aligned.

Shapes: E experts, O outputs, I inputs (filled up to a multiple of 8), G groups of inputs, B blocks of 16
outputs, R rows.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv3.checkpoint import fp8, names
from dsv3.checkpoint.fp8 import FP8, Put
from dsv3.checkpoint.safetensors_io import Kind, nbytes
from dsv3.checkpoint.stream import Shard, Task
from dsv3.checkpoint.weights import Weights, shard_files
from dsv3.common.errors import UserError
from dsv3.model import DeepSeekV3
from dsv3.ops.integers import GROUPS, LANES
from dsv3.quant.packed import Integers, matrices, pack, parts

METHOD = "dsv3"
LAYOUT = 2  # of the bytes; 1 had outputs one after the other
MODEL = {"architectures": ["DSV3PackedForCausalLM"], "model_type": "dsv3_packed"}
FORMATS = {"int8": 8, "int4": 4}


class Source(Protocol):
    """Where weights come from, by file name: a folder (:class:`Weights`), or drawn numbers."""

    def kind(self, name: str) -> Kind:
        """A tensor's dtype and shape."""
        ...

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to before ``last``: ``[R, width]``; any thread may ask."""
        ...


def wanted(to: str, group: int | None = None) -> Integers:
    """The format that ``--to int8|int4 --group N`` asks for."""
    if group is not None and to != "int4":
        raise UserError(f"--group ({group}) is for int4; {to} has none")
    if group is not None and group not in GROUPS:
        raise UserError(f"--group ({group}) must be one of {', '.join(map(str, GROUPS))}; 128 is the default")
    return Integers(FORMATS[to]) if group is None else Integers(FORMATS[to], group)


def quantization_config(integers: Integers) -> dict[str, Any]:
    """What ``config.json`` says of such a folder."""
    tree: dict[str, Any] = {"quant_method": METHOD, "layout": LAYOUT, "bits": integers.bits}
    return tree if integers.bits == 8 else {**tree, "group_size": integers.group}


def from_quantization_config(path: Path, facts: dict[str, Any]) -> Integers:
    """The format that the ``config.json`` at ``path`` names; :class:`UserError` for one there is not."""
    bits, group, layout = facts.get("bits", 0), facts.get("group_size", 128), facts.get("layout", 1)
    if bits not in FORMATS.values() or group not in GROUPS:
        raise UserError(f"{path}: quantization_config ({facts}) needs bits 8 or 4, group_size 32, 64 or 128")
    if layout != LAYOUT:
        raise UserError(
            f"{path}: its numbers lie in layout {layout}, this version reads {LAYOUT}; convert the original"
            " again"
        )
    return Integers(bits, group)


def kinds(model: DeepSeekV3, source: Source) -> dict[str, Kind]:
    """Dtype and shape of every tensor of a packed model (on the meta device) made from ``source``."""
    found: dict[str, Kind] = {}
    quantised = {path for path, _ in matrices(model)}
    for name, tensor in model.state_dict().items():
        dtype = tensor.dtype
        if name.rpartition(".")[0] not in quantised and not names.always_fp32(name):
            stored = source.kind(name)[0]
            dtype = torch.bfloat16 if name.endswith("embed_tokens.weight") or stored is FP8 else stored
        found[name] = dtype, tuple(tensor.shape)
    return found


def plan(model: DeepSeekV3, source: Source, integers: Integers) -> list[Shard]:
    """The files of a packed folder, from the plain model on the meta device, which becomes the packed one."""
    from_files: dict[str, list[str]] = {}
    for name, _ in names.hf_tensors(model):
        from_files.setdefault(names.our_name(name), []).append(name)
    quantised = {f"{path}.weight" for path, _ in matrices(model)}
    pack(model, integers)
    all_kinds = kinds(model, source)
    shards: list[tuple[dict[str, Kind], list[Task]]] = []
    for _, group in groupby(from_files, key=names.layer):
        made: dict[str, Kind] = {}
        tasks = []
        for ours in group:
            if ours in quantised:
                path = ours.removesuffix(".weight")
                made.update({name: kind for name, kind in all_kinds.items() if name.startswith(ours)})
                make = partial(quantise, path, from_files[ours], source, integers)
            else:
                made[ours] = all_kinds[ours]
                make = partial(fp8.translate, ours, source.kind(ours), made[ours][0], source.rows)
            tasks.append(Task(make, sum(nbytes(source.kind(name)) for name in from_files[ours])))
        shards.append((made, tasks))
    return [Shard(file, *shard) for file, shard in zip(shard_files(len(shards)), shards)]


def quantise(path: str, from_files: list[str], source: Source, integers: Integers, put: Put) -> None:
    """Put the parts of the matrix at ``path`` (a stack: one file tensor an expert), a band of rows at a time.

    Bands are whole blocks of outputs.

    Raises :class:`CheckpointError` for an infinity or a NaN.
    """
    for index, name in enumerate(from_files):
        kind = source.kind(name)
        before = index * ceil(kind[1][0] / LANES)
        for first, _, x_RI in fp8.read(name, kind, source.rows):
            weight = integers.quantise(path, x_RI)
            fp8.refuse_broken(name, weight.scales, f"INT{integers.bits}")
            for part, piece in parts(weight).items():
                put(f"{path}.{part}", (before + first // LANES) * piece[0].numel(), piece)


def load_mapped(model: DeepSeekV3, weights: Weights, device: torch.device) -> None:
    """Give a packed model on the meta device its folder's tensors: mapped, or copied to another device."""
    tensors = {name: weights.mapped(name).to(device) for name in weights.entries}
    model.load_state_dict(tensors, assign=True)


@torch.no_grad()
def load_quantising(model: DeepSeekV3, source: Source, integers: Integers, device: torch.device) -> None:
    """Make a plain model on the meta device the packed one, quantised band by band while it is read."""
    shards = plan(model, source, integers)
    tensors = {
        name: torch.empty(shape, dtype=dtype, device=device)
        for shard in shards
        for name, (dtype, shape) in shard.kinds.items()
    }

    def put(name: str, first: int, piece: Tensor) -> None:
        tensors[name].view(-1)[first : first + piece.numel()].copy_(piece.reshape(-1))

    for shard in shards:
        for task in shard.tasks:
            task.make(put)
    model.load_state_dict(tensors, assign=True)
