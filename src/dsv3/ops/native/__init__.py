"""Kernels for the CPU in C++, compiled once where a compiler is there; else plain PyTorch does the work.

A ``.cpp`` here needs no header but the language's own and its neighbours: it is compiled in a few seconds
with ``g++`` (or what ``CXX`` names), kept in the user's cache under the hash of its text and flags, and
called by ctypes with pointers. It shares torch's OpenMP threads, since torch's library of that name is loaded
already. ``DSV3_NATIVE=0`` turns all off.
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

FOLDER = Path(__file__).parent
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


def _build(name: str) -> Path:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler ({compiler})")
    source = FOLDER / f"{name}.cpp"
    texts = [path.read_bytes() for path in (source, *sorted(FOLDER.glob("*.h")))]
    key = hashlib.sha256(
        b"\0".join((*texts, " ".join(FLAGS).encode(), compiler.encode(), _processor().encode()))
    )
    target = cache_folder() / f"{name}-{key.hexdigest()[:20]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    try:
        done = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(temporary)], capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["the compiler failed"])[0])
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def find(name: str) -> ctypes.CDLL | str:
    """The compiled functions of a file here, or why there are none."""
    if os.environ.get("DSV3_NATIVE") == "0":
        return "DSV3_NATIVE=0"
    try:
        return ctypes.CDLL(str(_build(name)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled functions of a file here, or None (said once in the log) where there are none."""
    found = find(name)
    if not isinstance(found, str):
        log.debug("CPU kernels (%s): compiled", name)
        return found
    if os.environ.get("DSV3_NATIVE") == "0":  # as asked
        log.info("CPU kernels (%s): plain PyTorch (%s)", name, found)
    else:
        log.warning("CPU kernels (%s): plain PyTorch, several times slower (%s)", name, found)
    return None


def usable(x: Tensor, name: str) -> bool:
    """Whether compiled functions take this tensor: on a CPU, not empty, not being traced."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and library(name) is not None
    )
