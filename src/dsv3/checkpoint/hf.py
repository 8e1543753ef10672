"""Hugging Face folders in and out: ``config.json`` and safetensors, streamed (report, released weights).

Reading puts every tensor straight into the model's own memory, so the peak is the model and one buffer. What
does not fit is refused, with names, from the files' headers, before any memory is taken.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.checkpoint import names
from dsv3.checkpoint.errors import some, writing
from dsv3.checkpoint.safetensors_io import Entry, SafetensorsFile, write
from dsv3.common.errors import UserError, nearest
from dsv3.common.files import new_folder, write_json
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FP8 = torch.float8_e4m3fn
FP8_BLOCK = 128
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
# What a config.json says of its own folder and not of the model: code beside it, the files' number format.
_OF_THE_FOLDER = ("auto_map", "quantization_config", "dtype", "torch_dtype", "_name_or_path")


def load(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> DeepSeekV3:
    """Read a model from a Hugging Face checkpoint folder: BF16, FP32 or FP8, one file or shards.

    ``dtype`` None keeps every parameter as stored, FP8 becoming BF16; the experts' selection bias is FP32
    whatever is asked. The files decide how many MTP modules the model has: where ``config.json`` says
    otherwise, a warning does too. MTP layers may repeat embedding and head; copies that differ are dropped
    with a warning, since MTP uses the main model's own (report 2.2), here as in serving engines.

    Raises :class:`UserError` naming missing, unexpected or misshapen tensors, before any is read.
    """
    folder, kind, device = Path(folder), _dtype(dtype), _device(device)
    if quantize is not None:
        raise UserError(f"quantize ({quantize!r}) is not supported yet; use None and dtype for BF16 or FP32")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the local folder of a Hugging Face checkpoint")
    config = _config(folder)
    with Weights(folder) as weights:
        depth = names.mtp_depth(config, weights.entries)
        said = config.num_nextn_predict_layers
        if depth != said:
            if "num_nextn_predict_layers" in config.model_fields_set:
                warnings.warn(
                    f"{folder} holds {depth} MTP layers, its config.json says num_nextn_predict_layers"
                    f" {said}: the model has {depth}",
                    stacklevel=2,
                )
            config = ModelConfig.from_dict({**config.to_dict(), "num_nextn_predict_layers": depth})
        with torch.device("meta"):
            model = DeepSeekV3(config)
        weights.check(model)
        _allocate(model, weights.dtypes(model, kind), device)
        weights.fill(model)
        different = weights.differing_repeats(model)
    if different:
        warnings.warn(
            f"{folder}: {some(different)} differ from the main model's embedding or head; the main model's"
            " are used, which may lower the acceptance of MTP drafts",
            stacklevel=2,
        )
    return model


def save(
    model: DeepSeekV3,
    folder: str | Path,
    fp8: bool = False,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    tokenizer_files: Iterable[str | Path] = (),
) -> None:
    """Write a model as a new Hugging Face folder, whole or not at all.

    ``dtype`` None keeps every parameter's own; the experts' selection bias is FP32 in any case. Tensors go
    into ``model.safetensors``, or into shards of at most ``max_shard_bytes`` and an index. A folder that
    exists is never touched: :class:`UserError`.
    """
    folder, kind = Path(folder), _dtype(dtype)
    if fp8:
        raise UserError("fp8 (True) is not supported yet; save BF16 with dtype=torch.bfloat16")
    if folder.exists():
        raise UserError(f"{folder} already exists; choose a new folder or delete it first")
    with writing(folder), new_folder(folder) as temporary:
        save_into(model, temporary, kind, max_shard_bytes, tokenizer_files)


def save_into(
    model: DeepSeekV3,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    tokenizer_files: Iterable[str | Path] = (),
) -> dict[str, str]:
    """What :func:`save` writes, into an existing folder; returns the SHA-256 of each file with weights."""
    copied = [Path(path) for path in tokenizer_files]
    absent = [str(path) for path in copied if not path.is_file()]
    if absent:
        raise UserError(f"tokenizer file {some(absent)} does not exist")
    tensors = dict(names.hf_tensors(model))
    tensors.update({copy: tensors[original] for copy, original in names.mtp_repeats(model.config).items()})
    dtypes = {
        name: torch.float32 if names.always_fp32(name) else dtype or tensor.dtype
        for name, tensor in tensors.items()
    }
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()}
    shards = _shards(sizes, max_shard_bytes)
    digests = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file] = write(
            folder / file, {name: tensors[name] for name in shard}, dtypes, metadata={"format": "pt"}
        )
    if len(shards) > 1:
        where = {name: file for file, shard in zip(digests, shards) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    write_json(folder / "config.json", config_json(model.config, dtypes["lm_head.weight"]))
    write_json(folder / "generation_config.json", _generation_config(model.config))
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    return digests


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files in a checkpoint folder, to go along with a copy of the model."""
    return [path for name in TOKENIZER_FILES if (path := Path(folder) / name).is_file()]


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of a folder that holds the model in ``dtype``.

    ``torch_dtype`` is the key that every reader takes (transformers 5 reads it as ``dtype``).
    """
    tree = {key: value for key, value in config.to_dict().items() if key not in _OF_THE_FOLDER}
    return {**tree, "torch_dtype": str(dtype).removeprefix("torch.")}


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    tree = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    return tree if config.pad_token_id is None else {**tree, "pad_token_id": config.pad_token_id}


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Cut the names, in order, into runs of at most ``limit`` bytes (one larger tensor is a shard itself)."""
    if limit < 1:
        raise UserError(f"max_shard_bytes ({limit}) must be positive; 5 GiB is customary")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


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
                shapes[names.scale_name(name)] = tuple(-(-size // FP8_BLOCK) for size in shapes[name])
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
        odd = [
            f"{name} ({entry.dtype})"
            for name, entry in self.entries.items()
            if entry.dtype not in (*FLOATS.values(), FP8) or (entry.dtype is FP8 and len(entry.shape) != 2)
        ]
        if odd:
            raise UserError(
                f"{self.folder}: {some(odd)} must be FP32, BF16 or FP16, or FP8 with block scales"
            )

    def dtypes(self, model: DeepSeekV3, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """The dtype of each of the model's tensors, by our name: ``dtype``, or as stored."""
        found: dict[str, torch.dtype] = {}
        for name, _ in names.hf_tensors(model):
            stored = self.entries[name].dtype
            kind = dtype or (torch.bfloat16 if stored is FP8 else stored)
            kind = torch.float32 if names.always_fp32(name) else kind
            ours = names.our_name(name)
            found[ours] = torch.promote_types(found.get(ours, kind), kind)  # experts may differ
        return found

    def fill(self, model: DeepSeekV3) -> None:
        """Read every tensor into the model's memory, in the order of the files."""
        wanted = dict(names.hf_tensors(model))
        for name in sorted(wanted, key=lambda name: (self._files[name].path, self.entries[name].start)):
            if self.entries[name].dtype is FP8:
                self._dequantise(name, wanted[name])
            else:
                self._files[name].read(name, wanted[name])

    @torch.no_grad()
    def _dequantise(self, name: str, into: Tensor) -> None:
        """FP8 number times the scale of its 128 x 128 block (report 3.3), a row of blocks at a time."""
        scale = names.scale_name(name)
        scales = self._files[scale].read(scale).float()
        width = into.shape[1]
        for first, piece in self._files[name].pieces(name, FP8_BLOCK * width):
            row = first // width
            values = piece.view(-1, width).float()
            values *= scales[row // FP8_BLOCK].repeat_interleave(FP8_BLOCK)[:width]
            into[row : row + len(values)].copy_(values)

    def differing_repeats(self, model: DeepSeekV3) -> list[str]:
        """Names of the MTP layers' copies of embedding and head whose values are not the main model's."""
        tensors = dict(names.hf_tensors(model))
        different = []
        for copy, original in names.mtp_repeats(model.config).items():
            if copy not in self.entries:
                continue
            flat = tensors[original].view(-1)
            same = all(
                torch.equal(flat[first : first + len(piece)], piece.to(flat))
                for first, piece in self._files[copy].pieces(copy)
            )
            if not same:
                different.append(copy)
        return different


def _config(folder: Path) -> ModelConfig:
    """``config.json``, with what it says of the files checked and left behind."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of a Hugging Face checkpoint")
    config = ModelConfig.from_pretrained(folder)
    stored = config.extra.get("quantization_config")
    if stored:
        facts = stored if isinstance(stored, dict) else {}
        method, blocks = facts.get("quant_method"), [FP8_BLOCK, FP8_BLOCK]
        if method != "fp8" or facts.get("weight_block_size", blocks) != blocks:
            raise UserError(
                f"{path}: quantization_config ({stored}) is not supported; only fp8 in {blocks} is"
            )
    extra = {key: value for key, value in config.extra.items() if key not in _OF_THE_FOLDER}
    return config.model_copy(update={"extra": extra})


def _allocate(model: nn.Module, dtypes: dict[str, torch.dtype], device: torch.device) -> None:
    """Give every parameter and buffer of a model on the meta device memory, not yet filled."""
    for prefix, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            kind = dtypes[f"{prefix}.{name}" if prefix else name]
            empty = torch.empty(tensor.shape, dtype=kind, device=device)
            setattr(module, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in FLOATS:
            raise UserError(f"dtype ({dtype!r}) is unknown{nearest(dtype, FLOATS)}: {', '.join(FLOATS)}")
        return FLOATS[dtype]
    if dtype is not None and dtype not in FLOATS.values():
        raise UserError(f"dtype ({dtype}) is not one a model can be kept in: {', '.join(FLOATS)}")
    return dtype


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device ({str(device)!r}) cannot be used: {str(error).splitlines()[0]}") from None
    if found.type == "meta":
        raise UserError("device ('meta') holds no weights; make the bare model under torch.device('meta')")
    return found
