"""Kernels for the CPU in C++, compiled once where a compiler is there; else plain PyTorch does the work.

``kernels.cpp`` needs no header but the language's own: it is compiled in about a second with ``g++`` (or what
``CXX`` names), kept in the user's cache under the hash of its text and flags, and called by ctypes with
pointers. It shares torch's OpenMP threads, since torch's library of that name is loaded already.
``DSV3_NATIVE=0`` turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from dsv3.common.files import TEMPORARY
from dsv3.ops.formats import Format

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
PARALLEL_FROM = 1 << 15  # numbers; below, waking a second thread costs more than it saves

log = logging.getLogger("dsv3")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3"


def _processor() -> str:
    """What ``-march=native`` depends on: a cache shared by machines must not mix them up."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return platform.processor()


def _build() -> Path:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler ({compiler})")
    text = SOURCE.read_bytes()
    key = hashlib.sha256(
        b"\0".join((text, " ".join(FLAGS).encode(), compiler.encode(), _processor().encode()))
    )
    target = cache_folder() / f"kernels-{key.hexdigest()[:20]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    try:
        done = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(temporary)], capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["the compiler failed"])[0])
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (said once in the log) where there are none."""
    if os.environ.get("DSV3_NATIVE") == "0":
        log.info("CPU kernels: plain PyTorch (DSV3_NATIVE=0)")
        return None
    try:
        found = ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("CPU kernels: plain PyTorch, several times slower in FP8 (%s)", error)
        return None
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    found.dsv3_quantise.argtypes = [
        ctypes.c_int, pointer, pointer, pointer, pointer, long, long, long, long, number, ctypes.c_int,
        number, ctypes.c_int,
    ]  # fmt: skip
    found.dsv3_dequantise.argtypes = [
        ctypes.c_int, pointer, pointer, pointer, pointer, long, long, long, long, ctypes.c_int,
    ]  # fmt: skip
    log.info("CPU kernels: compiled")
    return found


def usable(x: Tensor) -> bool:
    """Whether the compiled kernels take this tensor: on a CPU, not empty, not being traced."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def _threads(numbers: int) -> int:
    return torch.get_num_threads() if numbers >= PARALLEL_FROM else 1


def _kind(kind: Format) -> int:
    return 10 * kind.exponent + kind.mantissa


def _counts(shape: torch.Size, counts_E: Tensor | None) -> Tensor:
    if counts_E is not None:
        return counts_E.to("cpu", torch.int64).contiguous()
    return torch.full((shape[:-2].numel(),), shape[-2], dtype=torch.int64)


def quantise(
    x: Tensor,
    tile: tuple[int, int],
    kind: Format,
    power_of_two_scales: bool,
    smallest_amax: float,
    counts_E: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Values and scales as :func:`dsv3.ops.blocks.quantise_reference` has them, bit by bit."""
    found = library()
    assert found is not None
    x = x.detach().float().contiguous()
    counts = _counts(x.shape, counts_E)
    rows, columns = tile
    width = x.shape[-1] if kind.dtype is not None else 3 * -(-x.shape[-1] // 2)
    values = torch.empty((*x.shape[:-1], width), dtype=kind.dtype or torch.uint8)
    if counts_E is None:
        tiles = (*x.shape[:-2], -(-x.shape[-2] // rows))
    else:
        tiles = (int((-(-counts // rows)).sum()),)
    scales = torch.empty((*tiles, -(-x.shape[-1] // columns)), dtype=torch.float32)
    found.dsv3_quantise(
        _kind(kind), x.data_ptr(), values.data_ptr(), scales.data_ptr(), counts.data_ptr(), len(counts),
        x.shape[-1], rows, columns, kind.largest, power_of_two_scales, smallest_amax, _threads(x.numel()),
    )  # fmt: skip
    return values, scales


def dequantise(
    values: Tensor,
    scales: Tensor,
    shape: torch.Size,
    tile: tuple[int, int],
    kind: Format,
    counts_E: Tensor | None,
) -> Tensor:
    """FP32 values as :func:`dsv3.ops.blocks.dequantise_reference` has them, bit by bit."""
    found = library()
    assert found is not None
    values, scales = values.contiguous(), scales.contiguous()
    counts = _counts(shape, counts_E)
    out = torch.empty(shape, dtype=torch.float32)
    found.dsv3_dequantise(
        _kind(kind), values.data_ptr(), scales.data_ptr(), out.data_ptr(), counts.data_ptr(), len(counts),
        shape[-1], *tile, _threads(out.numel()),
    )  # fmt: skip
    return out
