"""Hugging Face folders in and out: ``config.json`` and safetensors, streamed (report, released weights).

Reading puts every tensor straight into the model's own memory, so the peak is the model and one buffer. What
does not fit is refused, with names, from the files' headers, before any memory is taken.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.checkpoint import integers, names
from dsv3.checkpoint.errors import some, writing
from dsv3.checkpoint.fp8 import FP8, outputs, quantization_config, translate, width
from dsv3.checkpoint.safetensors_io import METADATA, Kind, SafetensorsWriter, nbytes, write
from dsv3.checkpoint.weights import FLOATS, INDEX, SINGLE, Weights, shard_files
from dsv3.common.errors import UserError, nearest
from dsv3.common.files import new_folder, write_json
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3, score
from dsv3.ops.blocks import BLOCK
from dsv3.quant import frozen, packed
from dsv3.quant.packed import Integers

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
    whatever is asked. ``quantize="fp8"`` keeps the matrices of the layers in FP8 with their block scales
    (:mod:`dsv3.quant.frozen`; half of BF16's memory, no gradient) and quantises those that are not stored so;
    ``dtype`` is for the rest. ``quantize="int8"`` and ``"int4"`` quantise while reading
    (:mod:`dsv3.quant.packed`; to run, without any gradient), ``dtype`` is then that of the activations, None
    FP32. A folder that ``dsv3 convert`` wrote in INT8 or INT4 is not read but mapped: its tensors come from
    the disk when they are looked at, and its files must stay as they are meanwhile.

    The files decide how many MTP modules the model has: where ``config.json`` says otherwise, a warning does
    too. MTP layers may repeat embedding and head; copies that differ are dropped with a warning, since MTP
    uses the main model's own (report 2.2), here as in serving engines.

    Raises :class:`UserError` naming missing, unexpected or misshapen tensors, before any is read.
    """
    folder, kind, device = Path(folder), _dtype(dtype), _device(device)
    stored = check_quantize(folder, quantize)
    config = read_config(folder)
    with Weights(folder) as weights:
        model = bare_model(config, weights, stored)
        warn_of_repeats(weights, model.config)
        if stored:
            integers.load_mapped(model, weights, device)
        elif quantize in integers.FORMATS:
            integers.load_quantising(model, weights, integers.wanted(quantize), device)
        else:
            if quantize == "fp8":
                frozen.freeze(model)
            _allocate(model, weights.dtypes(model, kind), device)
            weights.fill(model)
    if stored or quantize in integers.FORMATS:
        model.model.embed_tokens.compute_dtype = kind or torch.float32
    return model


def check_quantize(folder: str | Path, quantize: str | None) -> Integers | None:
    """Refuse what a folder cannot be loaded as; the format of one that holds a packed model, else None."""
    if quantize not in (None, "fp8", *integers.FORMATS):
        raise UserError(
            f"quantize ({quantize!r}) is unknown; use fp8, int8, int4, or None for the files' own"
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the local folder of a Hugging Face checkpoint")
    stored = stored_integers(folder)
    if stored and quantize not in (None, f"int{stored.bits}"):
        raise UserError(
            f"{folder} is int{stored.bits}, quantize ({quantize!r}) needs what that lost; load the original"
        )
    return stored


def warn_of_repeats(weights: Weights, config: ModelConfig) -> None:
    """Warn where MTP layers have an embedding or a head of their own, which are left out."""
    different = weights.differing_repeats(config)
    if different:
        warnings.warn(
            f"{weights.folder}: {some(different)} differ from the main model's embedding or head; the main"
            " model's are used, which may lower the acceptance of MTP drafts",
            stacklevel=3,
        )


def bare_model(config: ModelConfig, weights: Weights, stored: Integers | None = None) -> DeepSeekV3:
    """The model a folder holds, on the meta device; refuses the folder unless its tensors are the model's.

    ``stored``: the folder is a packed model's, and so is the model.
    """
    depth, said = names.mtp_depth(config, weights.entries), config.num_nextn_predict_layers
    if depth != said:
        if "num_nextn_predict_layers" in config.model_fields_set:
            warnings.warn(
                f"{weights.folder} holds {depth} MTP layers, its config.json says num_nextn_predict_layers"
                f" {said}: the model has {depth}",
                stacklevel=3,
            )
        config = ModelConfig.from_dict({**config.to_dict(), "num_nextn_predict_layers": depth})
    with torch.device("meta"):
        model = DeepSeekV3(config)
        if score.NAME in weights.entries:  # a reward model
            score.add_score(model)
    if stored:
        packed.pack(model, stored)
        weights.check_packed(model)
    else:
        weights.check(model)
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

    ``dtype`` None keeps every parameter's own, FP8 becoming BF16; the experts' selection bias is FP32 in any
    case. ``fp8`` stores the matrices of the layers in FP8 with block scales, as the released files do;
    ``dtype`` is for the rest, and a model loaded with ``quantize="fp8"`` gives its bytes back. Tensors go
    into ``model.safetensors``, or into shards of at most ``max_shard_bytes`` and an index. A folder that
    exists is never touched: :class:`UserError`.
    """
    folder, kind = Path(folder), _dtype(dtype)
    if folder.exists():
        raise UserError(f"{folder} already exists; choose a new folder or delete it first")
    with writing(folder), new_folder(folder) as temporary:
        save_into(model, temporary, kind, max_shard_bytes, tokenizer_files, fp8)


def save_into(
    model: DeepSeekV3,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    tokenizer_files: Iterable[str | Path] = (),
    fp8: bool = False,
) -> dict[str, str]:
    """What :func:`save` writes, into an existing folder.

    Returns the SHA-256 of the files with weights; not of those that FP8 had to do with.
    """
    copied = [Path(path) for path in tokenizer_files]
    absent = [str(path) for path in copied if not path.is_file()]
    if absent:
        raise UserError(f"tokenizer file {some(absent)} does not exist")
    if any(isinstance(module, packed.PackedLinear) for module in model.modules()):
        raise UserError(
            "a packed model is not saved: dsv3 convert SRC DST --to int8|int4 writes such a folder"
        )
    tensors = dict(names.hf_tensors(model))
    tensors.update({copy: tensors[original] for copy, original in names.mtp_repeats(model.config).items()})
    in_fp8 = names.quantised(model) if fp8 else set()
    kinds: dict[str, dict[str, Kind]] = {}
    for name, tensor in tensors.items():
        if names.is_scale(name):
            continue
        kind = dtype or (torch.bfloat16 if tensor.dtype is FP8 else tensor.dtype)
        kind = FP8 if name in in_fp8 else torch.float32 if names.always_fp32(name) else kind
        kinds[name] = outputs(name, tuple(tensor.shape), kind)
    shards = cut_into_shards(
        {name: sum(map(nbytes, made.values())) for name, made in kinds.items()}, max_shard_bytes
    )
    digests, where = {}, {}
    for file, shard in zip(shard_files(len(shards)), shards):
        dtypes = {name: kinds[name][name][0] for name in shard}
        where.update({name: file for weight in shard for name in kinds[weight]})
        if FP8 in {*dtypes.values(), *(tensors[name].dtype for name in shard)}:
            made = {name: kind for weight in shard for name, kind in kinds[weight].items()}
            _write_translated(folder / file, tensors, dtypes, made)
        else:
            chosen = {name: tensors[name] for name in shard}
            digests[file] = write(folder / file, chosen, dtypes, metadata=METADATA)
    total = sum(nbytes(kind) for made in kinds.values() for kind in made.values())
    scales = [tensor for name, tensor in tensors.items() if names.is_scale(name)]
    quantization = None
    if in_fp8:
        powers = bool(scales) and all(bool((tensor.frexp()[0] == 0.5).all()) for tensor in scales)
        quantization = quantization_config(powers)
    write_rest(folder, model.config, kinds["lm_head.weight"]["lm_head.weight"][0], quantization, where, total)
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    return digests


@torch.no_grad()
def _write_translated(
    path: Path, tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype], made: dict[str, Kind]
) -> None:
    """A file of weights, one band of rows at a time in the memory of the CPU."""

    def rows(name: str, first: int, last: int) -> Tensor:
        tensor = tensors[name].detach()
        return tensor.reshape(-1, width(tuple(tensor.shape)))[first:last].to("cpu")

    with SafetensorsWriter(path, made, METADATA) as file:
        for name, dtype in dtypes.items():
            translate(name, (tensors[name].dtype, tuple(tensors[name].shape)), dtype, rows, file.put)


def write_rest(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None,
    where: dict[str, str],
    total_bytes: int,
) -> None:
    """What a folder holds beside weights and tokenizer: the index, if there are shards, and configurations.

    ``where``: the file of every tensor. ``dtype``: of what is not in FP8.
    """
    if set(where.values()) != {SINGLE}:
        write_json(
            folder / INDEX,
            {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(where.items()))},
        )
    write_json(folder / "config.json", config_json(config, dtype, quantization))
    write_json(folder / "generation_config.json", _generation_config(config))


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files in a checkpoint folder, to go along with a copy of the model."""
    return [path for name in TOKENIZER_FILES if (path := Path(folder) / name).is_file()]


def config_json(
    config: ModelConfig, dtype: torch.dtype, quantization: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``config.json`` of a folder that holds the model in ``dtype``, or in FP8 and ``dtype``.

    ``torch_dtype`` is the key that every reader takes (transformers 5 reads it as ``dtype``).
    """
    tree = {key: value for key, value in config.to_dict().items() if key not in _OF_THE_FOLDER}
    tree["torch_dtype"] = str(dtype).removeprefix("torch.")
    if quantization and quantization["quant_method"] == integers.METHOD:
        tree.update(integers.MODEL)
    return {**tree, "quantization_config": quantization} if quantization else tree


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    tree = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    return tree if config.pad_token_id is None else {**tree, "pad_token_id": config.pad_token_id}


def cut_into_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
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


def read_config(folder: Path) -> ModelConfig:
    """``config.json``, with what it says of the files checked and left behind."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of a Hugging Face checkpoint")
    config = ModelConfig.from_pretrained(folder)
    stored_quantization(folder)
    extra = {key: value for key, value in config.extra.items() if key not in _OF_THE_FOLDER}
    return config.model_copy(update={"extra": extra})


def stored_quantization(folder: Path) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``, empty without one; refuses what dsv3 does not read."""
    stored = ModelConfig.from_pretrained(folder).extra.get("quantization_config")
    if not stored:
        return {}
    facts = stored if isinstance(stored, dict) else {}
    path = folder / "config.json"
    if facts.get("quant_method") == integers.METHOD:
        integers.from_quantization_config(path, facts)
    elif facts.get("quant_method") != "fp8" or facts.get("weight_block_size", [*BLOCK]) != [*BLOCK]:
        raise UserError(
            f"{path}: quantization_config ({stored}) is not supported; only fp8 in {[*BLOCK]} is,"
            " and what dsv3 convert wrote"
        )
    return facts


def stored_integers(folder: Path) -> Integers | None:
    """The format of a folder that holds a packed model; None for any other."""
    facts = stored_quantization(folder)
    if facts.get("quant_method") != integers.METHOD:
        return None
    return integers.from_quantization_config(folder / "config.json", facts)


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
