"""Claim 9: what is lost when a tensor quantised along its rows is quantised again along its columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.bench.claims.claim import CONTRARY, HOLDS, Claim, Measured, Options
from dsv3.bench.claims.pictures import bars, canvas, save
from dsv3.ops.blocks import COLUMN, ROW, dequantise, quantise
from dsv3.ops.formats import E4M3, E5M6, Format

TOKENS, CHANNELS = 4096, 1024
LOSSLESS = 1e-6


def added(x: Tensor, kind: Format, power_of_two_scales: bool) -> float:
    """Error of the second quantisation alone, relative to the tensor's norm."""
    once = dequantise(quantise(x, ROW, kind, power_of_two_scales))
    twice = dequantise(quantise(once, COLUMN, kind, power_of_two_scales))
    return float((twice - once).norm() / once.norm())


def measure(options: Options) -> Measured:
    """Both formats, scales free and powers of two; activations whose channels differ by factors of 2^6."""
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in options.seeds:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(TOKENS, CHANNELS, generator=generator)
        x = x * torch.exp2(6 * torch.rand(CHANNELS, generator=generator))
        for kind in (E4M3, E5M6):
            row = errors.setdefault(kind.name.upper(), {"free": [], "power": []})
            row["free"].append(added(x, kind, False))
            row["power"].append(added(x, kind, True))
    worst = {name: {key: max(values) for key, values in row.items()} for name, row in errors.items()}
    good = all(row["power"] < LOSSLESS < row["free"] for row in worst.values())
    return Measured(
        "; ".join(
            f"{name}: {row['free']:.2e} with free scales, {row['power']:.1e} with powers of two"
            for name, row in worst.items()
        ),
        HOLDS if good else CONTRARY,
        ("format", "error added, free scales", "error added, powers of two"),
        [(name, f"{row['free']:.2e}", f"{row['power']:.1e}") for name, row in worst.items()],
        {"worst": worst},
    )


def draw(data: dict[str, Any], path: Path) -> None:
    """A bar a way."""
    figure, (axis,) = canvas(1, 7, 2.2)
    words = {"free": "free scales", "power": "powers of two"}
    values = {
        f"{name}, {words[key]}": value for name, row in data["worst"].items() for key, value in row.items()
    }
    bars(axis, values, "relative error that tiles of 128 x 1 add to tiles of 1 x 128")
    save(figure, path)


RETILING = Claim(
    9, "retiling",
    "What is kept after attention, in E5M6 with scales that are powers of two, goes from tiles of 1 x 128 to"
    " 128 x 1 without a further quantisation error.",
    "3.3.3",
    f"{TOKENS:,} tokens of {CHANNELS:,} channels, normal, channels scaled by up to 2^6, quantised by rows,"
    " then by columns; the worst of the seeds",
    "Exact arithmetic on real formats; activations of a wider range than the formats' own would add errors"
    " where they become subnormal.",
    measure, draw,
)  # fmt: skip
