"""Whether a library of GPU kernels can be used on a device, and why not (floor 1)."""

from __future__ import annotations

import importlib
import importlib.util

import torch

HOPPER = 9  # the major number of its compute capability
HOW = {"triton": " (pip install 'dsv3[gpu]')"}


def unsuited(device: torch.device, oldest: int, newest: int | None = None) -> str | None:
    """Why a GPU is none of those of the major compute capabilities ``oldest`` to ``newest``, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if oldest <= major and (newest is None or major <= newest):
        return None
    wanted = f"{oldest}" if oldest == newest else f"{oldest} or newer"
    return f"needs compute capability {wanted}, this GPU has {major}.{minor}"


def missing(name: str, device: torch.device, oldest: int, newest: int | None = None) -> str | None:
    """Why a library cannot be used on a GPU, or None; capabilities as for :func:`unsuited`."""
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed{HOW.get(name, '')}"
    if (why := unsuited(device, oldest, newest)) is not None:
        return why
    try:
        importlib.import_module(name)
    except Exception as error:  # built for another PyTorch, or CUDA's compiler is not where it looks
        return f"{name} cannot be imported: {type(error).__name__} {error}".splitlines()[0]
    return None
