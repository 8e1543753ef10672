"""``dsv3 bench convert``: converting a folder beside copying its files, in turns.

Both read files that are not in the system's cache and end when what they wrote is on the disk. Bytes are
counted as read plus written. Copying is ``shutil.copyfile``, as many files at once as there are workers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dsv3.bench.machine import machine
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.hf import save
from dsv3.common.errors import UserError
from dsv3.common.progress import Progress, human
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3

SHARD = 2**27  # bytes of BF16


def shape(gigabytes: float) -> ModelConfig:
    """Layers of the 16b preset with fewer experts, as many as make about so many bytes in BF16."""
    config = ModelConfig.preset("16b", vocab_size=4096, n_routed_experts=16, num_hidden_layers=2)
    with torch.device("meta"):
        sizes = [DeepSeekV3(config.model_copy(update={"num_hidden_layers": n})) for n in (1, 2)]
    one, two = (sum(parameter.numel() for parameter in model.parameters()) for model in sizes)
    layers = round((gigabytes * 1e9 / 2 - one) / (two - one)) + 1
    if layers < 2:
        raise UserError(f"--gigabytes ({gigabytes:g}) is less than two layers; use {2e-9 * two:.2f} or more")
    return config.model_copy(update={"num_hidden_layers": layers})


def make(folder: Path, gigabytes: float) -> None:
    """A BF16 folder of random weights, the same 4 M numbers again and again, in shards of 128 MiB."""
    with torch.device("meta"):
        model = DeepSeekV3(shape(gigabytes)).bfloat16()
    model.to_empty(device="cpu")
    noise = (0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))).bfloat16()
    for tensor in model.state_dict().values():
        for piece in tensor.view(-1).split(len(noise)):
            piece.copy_(noise[: len(piece)])
    save(model, folder, max_shard_bytes=SHARD)


def copy(source: Path, target: Path, workers: int) -> None:
    """Copy the files of a folder and wait until they are on the disk."""
    target.mkdir()

    def one(file: Path) -> None:
        shutil.copyfile(file, target / file.name)
        _sync(target / file.name)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, sorted(source.iterdir())))


def _sync(path: Path, forget: bool = False) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def bench(path: Path, gigabytes: float = 1.0, rounds: int = 5, workers: int = 2) -> dict[str, Any]:
    """Medians of bytes a second over ``rounds``, in which copying and converting alternate."""
    with tempfile.TemporaryDirectory(prefix="dsv3-bench-", dir=path) as name:
        folder = Path(name)
        make(folder / "bf16", gigabytes)
        convert(folder / "bf16", folder / "fp8", "fp8", workers=workers)
        out = folder / "out"
        jobs: dict[str, tuple[str, Callable[[Path], object]]] = {
            "copy bf16": ("bf16", lambda source: copy(source, out, workers)),
            "bf16 to fp8": ("bf16", lambda source: convert(source, out, "fp8", workers=workers)),
            "copy fp8": ("fp8", lambda source: copy(source, out, workers)),
            "fp8 to bf16": ("fp8", lambda source: convert(source, out, "bf16", workers=workers)),
        }
        rates: dict[str, list[float]] = {job: [] for job in jobs}
        with Progress("bench convert", rounds * len(jobs), "runs") as progress:
            for _ in range(rounds):
                for job, (source, run) in jobs.items():
                    for file in (folder / source).iterdir():
                        _sync(file, forget=True)
                    started = time.perf_counter()
                    run(folder / source)
                    seconds = time.perf_counter() - started
                    rates[job].append((_nbytes(folder / source) + _nbytes(out)) / seconds / 1e9)
                    shutil.rmtree(out)
                    progress.note(f"{job} {rates[job][-1]:.2f} GB/s")
                    progress.advance(1)
        size = _nbytes(folder / "bf16")
    medians = {job: median(found) for job, found in rates.items()}
    return {
        "ratios": {
            "copyfile:bf16 to fp8": medians["bf16 to fp8"] / medians["copy bf16"],
            "copyfile:fp8 to bf16": medians["fp8 to bf16"] / medians["copy fp8"],
        },
        "ours": {f"{job}:gb_per_second": medians[job] for job in ("bf16 to fp8", "fp8 to bf16")},
        "peers": {"copyfile": {f"{job}:gb_per_second": medians[job] for job in ("copy bf16", "copy fp8")}},
        "all": {job: [round(rate, 3) for rate in found] for job, found in rates.items()},
        "bf16_bytes": size,
        "workers": workers,
        "machine": {**machine(), "disk": str(path)},
    }


def report(result: dict[str, Any]) -> str:
    """The result as a small table."""
    lines = [
        f"{human(result['bf16_bytes'])}B of BF16 under {result['machine']['disk']},"
        f" {result['workers']} workers; GB/s read and written, median (least, most)"
    ]
    for job, rates in result["all"].items():
        lines.append(f"  {job:<12} {sorted(rates)[len(rates) // 2]:.2f} ({min(rates):.2f}, {max(rates):.2f})")
    lines.append("ratios (ours / theirs):")
    lines += [f"  {name:<24} {ratio:.2f}" for name, ratio in result["ratios"].items()]
    return "\n".join(lines)
