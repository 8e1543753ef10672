"""What this machine has, which fast paths are on, and why others are off."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from dsv3 import __version__
from dsv3.bench.machine import machine
from dsv3.common.errors import UserError
from dsv3.evaluate.sandbox.run import strongest
from dsv3.ops import backend, native
from dsv3.serve import absorbed

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
# module: (what it is for, how to get it)
LIBRARIES = {
    "triton": ("FP8 and fused kernels on a GPU", "pip install 'dsv3[gpu]'"),
    "deep_gemm": ("FP8 products on Hopper", "pip install sgl-deep-gemm, or build DeepGEMM; needs nvcc"),
    "flash_mla": ("attention over the paged cache on Hopper", "build FlashMLA; needs nvcc"),
    "deep_ep": ("tokens to experts, a copy a rank (parallel.expert)", "build DeepEP; needs nvcc and NVLink"),
    "pyarrow": ("parquet and Arrow tables", "pip install 'dsv3[data]'"),
    "datasets": ("Hugging Face data sets", "pip install 'dsv3[data]'"),
    "zstandard": ("jsonl.zst", "pip install 'dsv3[data]'"),
    "reasoning_gym": ("tasks gym/...", "pip install 'dsv3[rl]'"),
    "math_verify": ("mathematics that is equal but not the same text", "pip install 'dsv3[rl]'"),
    "lm_eval": ("lm-evaluation-harness", "pip install 'dsv3[eval]'"),
    "openai": ("teachers behind an API", "pip install 'dsv3[distill]'"),
    "tensorboard": ("log.report_to tensorboard", "pip install 'dsv3[track]'"),
    "wandb": ("log.report_to wandb", "pip install 'dsv3[track]'"),
    "trackio": ("log.report_to trackio", "pip install 'dsv3[track]'"),
    "mlperf_logging": ("log.report_to mlperf", "pip install 'dsv3[mlperf]'"),
}

Finding = dict[str, Any]  # name, on, detail: what is used, or why not and the way out


def examine() -> dict[str, Any]:
    """``machine``: figures, sizes in bytes. ``paths``: fast paths and services; ``libraries``: optional."""
    return {
        "machine": _machine(),
        "paths": [*_kernels(), *_operators(), _compiler(), _sandbox()],
        "libraries": [_library(name, *about) for name, about in LIBRARIES.items()],
    }


def _machine() -> dict[str, Any]:
    memory, disk, cache = psutil.virtual_memory(), shutil.disk_usage(Path.cwd()), native.cache_folder()
    found = machine()
    found["cores_usable"] = len(psutil.Process().cpu_affinity()) if _has_affinity() else os.cpu_count()
    found["threads"] = torch.get_num_threads()
    found["instructions"] = _instructions()
    found["system"] = f"{platform.system()} {platform.release()}"
    found["memory_bytes"], found["memory_free_bytes"] = memory.total, memory.available
    found["disk_free_bytes"] = disk.free
    found["cache"] = str(cache)
    found["cache_bytes"] = sum(path.stat().st_size for path in cache.glob("*") if path.is_file())
    found["gpus"] = [_gpu(number) for number in range(torch.cuda.device_count())]
    return found


def _has_affinity() -> bool:
    return hasattr(psutil.Process, "cpu_affinity")


def _instructions() -> list[str]:
    """Of those that matter to us, the ones this processor has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return [name for name in INSTRUCTIONS if name in flags]


def _gpu(number: int) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return {
        "name": about.name, "capability": f"{about.major}.{about.minor}",
        "memory_bytes": total, "memory_free_bytes": free,
    }  # fmt: skip


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger says nothing in the meantime: it stands in the findings."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _kernels() -> Iterator[Finding]:
    """The C++ kernels, compiled now where they were not yet."""
    for source in sorted(native.FOLDER.glob("*.cpp")):
        found = native.find(source.stem)
        reason = f"plain PyTorch ({found})" if isinstance(found, str) else "compiled"
        yield {"name": f"CPU kernels: {source.stem}", "on": not isinstance(found, str), "detail": reason}


def _operators() -> Iterator[Finding]:
    """What each FP8 operator uses, and decoding with DeepSeek-V3's sizes; on is what is not the reference."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    with _quiet("dsv3"):
        choices = [*backend.choices(), absorbed.choose((torch.device(device), *absorbed.V3))]
    for choice in choices:
        refused = "; ".join(f"{name} not: {why}" for name, why in choice.refused.items())
        yield {
            "name": f"{choice.family} {choice.operator}",
            "on": choice.order[0] != "reference",
            "detail": ", else ".join(choice.order) + (f" ({refused})" if refused else ""),
        }


def _compiler() -> Finding:
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    return {
        "name": "C++ compiler", "on": path is not None,
        "detail": path or f"{name} is not there: install g++, or name another with CXX",
    }  # fmt: skip


def _sandbox() -> Finding:
    """How programs that a model wrote can be run."""
    try:
        return {"name": "sandbox", "on": True, "detail": strongest()}
    except UserError as error:
        return {"name": "sandbox", "on": False, "detail": str(error)}


def _library(module: str, purpose: str, way: str) -> Finding:
    if find_spec(module) is None:
        return {"name": module, "on": False, "detail": f"{purpose}: {way}"}
    version = _version(module)
    return {"name": module, "on": True, "detail": f"{purpose}{f' ({version})' if version else ''}"}


def _version(module: str) -> str | None:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:  # a wheel of another name
        return None


def report(found: dict[str, Any], human: Callable[[float], str]) -> str:
    """Lines for a person; ``human`` writes a number of bytes."""
    about = found["machine"]
    lines = [
        f"{about['cpu']}, {about['cores_usable']} of {about['cores']} cores, {about['threads']} threads"
        f" ({' '.join(about['instructions']) or 'no vector instructions known'})",
        f"memory {human(about['memory_bytes'])}B, {human(about['memory_free_bytes'])}B free;"
        f" disk {human(about['disk_free_bytes'])}B free; compiled kernels {human(about['cache_bytes'])}B in"
        f" {about['cache']}",
        f"dsv3 {__version__}, {about['system']}, Python {about['python']}, torch {about['torch']}",
    ]
    for gpu in about["gpus"]:
        lines.append(
            f"GPU {gpu['name']}, capability {gpu['capability']}, {human(gpu['memory_bytes'])}B,"
            f" {human(gpu['memory_free_bytes'])}B free"
        )
    if not about["gpus"]:
        lines.append("no GPU that torch can see")
    for part in ("paths", "libraries"):
        lines.append("")
        width = max(len(one["name"]) for one in found[part])
        for one in found[part]:
            lines.append(
                f"{'on ' if one['on'] else '-- '} {one['name'].ljust(width)}  {one['detail']}".rstrip()
            )
    return "\n".join(lines)
