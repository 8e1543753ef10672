"""Which implementation a GPU's FP8 operators use: chosen once, logged, and why not another (floor 1).

Shapes: M rows (tokens), N outputs, K inputs, E experts. What a machine has is found out when an operator is
first used: an implementation has to be installed, to suit the GPU, and to get a small example right.
``DSV3_FP8_GEMM`` names one to try before the others; ``reference`` means plain PyTorch throughout.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dsv3.common.errors import UserError, nearest
from dsv3.ops import deepgemm, library, scaled_mm
from dsv3.ops.blocks import (
    BLOCK,
    COLUMN,
    ROW,
    SMALLEST_AMAX,
    Quantised,
    Tile,
    dequantise_reference,
    quantise_reference,
)
from dsv3.ops.formats import E4M3, Format
from dsv3.ops.grouped import grouped_linear_reference

VARIABLE = "DSV3_FP8_GEMM"
# In the order they are tried. dgrad is linear with the weights transposed.
ORDER: dict[str, tuple[str, ...]] = {
    "quantise": ("triton", "reference"),
    "linear": ("torch", "deepgemm", "triton", "reference"),
    "wgrad": ("torch", "triton", "reference"),
    "grouped linear": ("deepgemm", "triton", "reference"),
    "grouped wgrad": ("triton", "reference"),
}
NAMES = ("auto", "torch", "deepgemm", "triton", "reference")
LARGEST_ERROR = 1e-2  # of an example: sums in FP8 instructions are off by less, a wrong layout by about 1

log = logging.getLogger("dsv3")


@dataclass(frozen=True)
class Choice:
    """What an operator uses: the first of ``order`` that takes the operands of a call."""

    operator: str
    order: tuple[str, ...]
    refused: dict[str, str]  # name: why not
    family: str = "FP8"

    def __str__(self) -> str:
        refused = [f"{name} not: {why}" for name, why in self.refused.items()]
        return f"{self.family} {self.operator}: {'; '.join([', else '.join(self.order), *refused])}"


class Reference:
    """Dequantise, then multiply in FP32."""

    @staticmethod
    def linear(x: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As :func:`dsv3.ops.fp8.linear`."""
        x_MK, w_NK = dequantise(x), dequantise(w)
        if counts_E is None:
            return (x_MK @ w_NK.T).to(dtype)
        return grouped_linear_reference(x_MK, w_NK, counts_E).to(dtype)

    @staticmethod
    def wgrad(g: Quantised, x: Quantised, counts_E: Tensor | None) -> Tensor:
        """As :func:`dsv3.ops.fp8.wgrad`."""
        g_MN, x_MK = dequantise(g), dequantise(x)
        if counts_E is None:
            return g_MN.T @ x_MK
        rows = counts_E.tolist()
        return torch.stack([a.T @ b for a, b in zip(g_MN.split(rows), x_MK.split(rows))])


def implementation(name: str) -> Any:
    """An implementation's products, each with a function that says what it takes."""
    if name == "triton":
        return importlib.import_module("dsv3.ops.triton_gemm")
    return {"torch": scaled_mm, "deepgemm": deepgemm, "reference": Reference}[name]


def _quantiser() -> Any:
    return importlib.import_module("dsv3.ops.triton_quantise")


def _refusal(name: str, operator: str, device: torch.device) -> str | None:
    """Why an implementation is not used on this device, or None."""
    if name == "reference":
        return None
    if device.type != "cuda":
        return "no CUDA device"
    if name == "triton":
        why = library.missing("triton", device, library.HOPPER)
    else:
        why = implementation(name).missing(device)
    if why is not None:
        return why
    try:
        error = error_of(name, operator, device)
    except Exception as problem:  # whatever it is, another implementation can do the work
        return f"an example failed: {type(problem).__name__} {problem}".splitlines()[0]
    return None if error <= LARGEST_ERROR else f"an example was off by {error:.1e} of its norm"


def error_of(name: str, operator: str, device: torch.device) -> float:
    """Relative error of an implementation on a small example; the reference does the same on the CPU."""
    verb, draw = operator.split()[-1], torch.Generator().manual_seed(0)
    counts_E = torch.tensor([100, 0, 156]) if operator.startswith("grouped") else None
    first = torch.randn(256, 384, generator=draw)

    def run(function: Callable[..., Tensor], make: Callable[..., Quantised], on: torch.device) -> Tensor:
        counts = None if counts_E is None else counts_E.to(on)
        if verb == "wgrad":
            g, x = (make(t.to(on), COLUMN, counts_E=counts) for t in (first[:, :128], first))
            return function(g, x, counts)
        weights = first.to(on) if counts is None else first.to(on).expand(3, -1, -1).contiguous()
        return function(
            make(first.to(on), ROW, counts_E=counts), make(weights, BLOCK), counts, torch.bfloat16
        )

    cpu = torch.device("cpu")
    if verb == "quantise":
        got = dequantise_reference(_quantiser().quantise(first.to(device), ROW))
        wanted = dequantise_reference(quantise_reference(first, ROW))
    else:
        got = run(getattr(implementation(name), verb), quantise, device)
        wanted = run(getattr(Reference, verb), quantise_reference, cpu)
    got, wanted = got.to(cpu, torch.float64), wanted.double()
    return float((got - wanted).norm() / wanted.norm())


def _wanted() -> str:
    name = os.environ.get(VARIABLE, "auto")
    if name not in NAMES:
        raise UserError(
            f"{VARIABLE} ({name}) is unknown{nearest(name, NAMES)}; use one of {', '.join(NAMES)}"
        )
    return name


@functools.cache
def choose(operator: str, device: torch.device) -> Choice:
    """The implementations of an operator on a device; decided once, and then logged."""
    wanted, order = _wanted(), ORDER[operator]
    if wanted == "reference":
        order = ("reference",)
    elif wanted in order:
        order = (wanted, *(name for name in order if name != wanted))
    refused = {name: why for name in order if (why := _refusal(name, operator, device)) is not None}
    if wanted in refused and device.type == "cuda":
        raise UserError(f"{VARIABLE} ({wanted}) cannot do {operator}: {refused[wanted]}; use auto")
    choice = Choice(operator, tuple(name for name in order if name not in refused), refused)
    if device.type == "cuda":
        log.info("%s", choice)
    return choice


def choices(device: torch.device | None = None) -> list[Choice]:
    """What every operator uses on a device (by default the current GPU), and why not something else."""
    if device is None:
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    return [choose(operator, device) for operator in ORDER]


def _pick(operator: str, x: Quantised, takes: str, *operands: Any) -> Any:
    """The first implementation that takes the operands; the reference takes any."""
    for name in choose(operator, x.values.device).order:
        if name == "reference" or getattr(implementation(name), takes)(*operands):
            return implementation(name)


def linear(x: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As :func:`dsv3.ops.fp8.linear`, on a GPU."""
    operator = "linear" if counts_E is None else "grouped linear"
    return _pick(operator, x, "takes_linear", x, w, counts_E, dtype).linear(x, w, counts_E, dtype)


def dgrad(g: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As :func:`dsv3.ops.fp8.dgrad`, on a GPU."""
    return linear(g, transposed(w), counts_E, dtype)


def wgrad(g: Quantised, x: Quantised, counts_E: Tensor | None) -> Tensor:
    """As :func:`dsv3.ops.fp8.wgrad`, on a GPU."""
    operator = "wgrad" if counts_E is None else "grouped wgrad"
    return _pick(operator, x, "takes_wgrad", g, x, counts_E).wgrad(g, x, counts_E)


_transposed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def transposed(w: Quantised) -> Quantised:
    """Weights ``[..., N, K]`` as ``[..., K, N]`` in memory too, made once and kept as long as they are."""
    found = _transposed.get(w.values)
    if found is None:
        if choose("quantise", w.values.device).order[0] == "triton":
            found = implementation("triton").transposed(w.values)
        else:
            found = w.values.transpose(-1, -2).contiguous()
        _transposed[w.values] = found
    tile = Tile(w.tile.columns, w.tile.rows)
    return Quantised(found, w.scales.transpose(-1, -2), found.shape, tile, w.kind)


def _by_triton(device: torch.device, tile: Tile, kind: Format) -> bool:
    return choose("quantise", device).order[0] == "triton" and _quantiser().takes(tile, kind)


def quantise(
    x: Tensor,
    tile: Tile,
    kind: Format = E4M3,
    power_of_two_scales: bool = False,
    smallest_amax: float = SMALLEST_AMAX,
    counts_E: Tensor | None = None,
) -> Quantised:
    """As :func:`dsv3.ops.blocks.quantise`, on a GPU; its layout is for the products there."""
    make = _quantiser().quantise if _by_triton(x.device, tile, kind) else quantise_reference
    return make(x, tile, kind, power_of_two_scales, smallest_amax, counts_E)


def swiglu(
    gate: Tensor,
    up: Tensor,
    tile: Tile,
    kind: Format = E4M3,
    power_of_two_scales: bool = False,
    smallest_amax: float = SMALLEST_AMAX,
    counts_E: Tensor | None = None,
) -> Quantised:
    """``silu(gate) * up`` in FP32, quantised: both ``[M, F]``; what is between is never in memory."""
    options = (tile, kind, power_of_two_scales, smallest_amax, counts_E)
    if _by_triton(gate.device, tile, kind):
        return _quantiser().quantise(gate, *options, up=up)
    return quantise_reference(F.silu(gate.float()) * up.float(), *options)


def dequantise(q: Quantised) -> Tensor:
    """As :func:`dsv3.ops.blocks.dequantise`, on a GPU."""
    # Tiles of 128 rows an expert that the reference made are not laid out as Triton's are.
    foreign = q.tile == COLUMN and q.counts_E is not None and q.values.shape == q.shape
    if not foreign and _by_triton(q.values.device, q.tile, q.kind):
        return _quantiser().dequantise(q)
    return dequantise_reference(q)
