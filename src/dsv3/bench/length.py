"""``dsv3 bench length``: peak memory of a training step against the length of its one sequence.

Attention runs by blocks of queries and the loss by chunks of logits, so nothing of T x T or T x V is ever
there and memory should grow with T. Each length is a process of its own (the worker of ``dsv3 bench train``).
There the C library gives freed tensors back at once: the peak is what is in use, not what it keeps for later.
The fitted curve is a + b T^p: a is weights, moments and the libraries themselves. Below about a thousand
tokens the peak is the optimizer's, not the activations', and says nothing of T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench.machine import machine
from dsv3.bench.train import Worker
from dsv3.common.errors import UserError
from dsv3.common.progress import Progress
from dsv3.config.model import ModelConfig

RECOMPUTE = ("none", "layer")


def bench(
    lengths: Sequence[int],
    model: dict[str, Any] | None = None,
    recompute: Sequence[str] = RECOMPUTE,
    threads: int = 0,
) -> dict[str, Any]:
    """Peak bytes and seconds of a step of one sequence, for each length and each recompute setting.

    ``model``: the fields of a configuration; None: ``tiny`` without its MTP module. ``fits``: a, b and p of
    each setting, in bytes.
    """
    if len(set(lengths)) < 4:
        raise UserError(
            f"--lengths ({', '.join(map(str, lengths))}) must be four or more, to fit three numbers"
        )
    shape = model or ModelConfig.preset("tiny", num_nextn_predict_layers=0).model_dump()
    shape = {**shape, "max_position_embeddings": max(lengths)}
    peaks: dict[str, dict[int, int]] = {}
    seconds: dict[str, dict[int, float]] = {}
    with Progress("bench length", len(recompute) * sum(lengths), "tok") as progress:
        for setting in recompute:
            peaks[setting], seconds[setting] = {}, {}
            for length in sorted(set(lengths)):
                job = {
                    "peer": "ours", "device": "cpu", "precision": "fp32", "sequences": 1, "length": length,
                    "model": shape, "threads": threads, "recompute": setting,
                }  # fmt: skip
                with Worker(job, MALLOC_MMAP_THRESHOLD_="65536") as worker:
                    worker.ask("step")  # makes the moments: without them the first step would peak at its end
                    seconds[setting][length] = round(worker.ask("step")["seconds"], 3)
                    peaks[setting][length] = worker.ask("memory")["bytes"]
                progress.note(f"{length}: {peaks[setting][length] / 2**20:.0f} MiB")
                progress.advance(length)
    return {
        "peak_bytes": peaks,
        "step_seconds": seconds,
        "fits": {setting: fit(peaks[setting]) for setting in recompute},
        "machine": {**machine(), "threads": threads or "default"},
    }


def fit(peaks: dict[int, int]) -> dict[str, float]:
    """``base`` + ``factor`` * T ** ``exponent`` in bytes, of least squares over the relative errors."""
    lengths, sizes = np.array(list(peaks), float), np.array(list(peaks.values()), float)
    best: tuple[float, dict[str, float]] = (math.inf, {})
    for exponent in np.arange(0.5, 2.5, 0.01):
        curve = np.stack((np.ones_like(lengths), (lengths / lengths.max()) ** exponent), axis=1)
        (base, top), *_ = np.linalg.lstsq(curve / sizes[:, None], np.ones_like(sizes), rcond=None)
        error = float(np.square(curve @ (base, top) / sizes - 1).sum())
        if error < best[0]:
            factor = float(top / lengths.max() ** exponent)
            best = (error, {"base": float(base), "factor": factor, "exponent": round(float(exponent), 2)})
    return best[1]


def report(result: dict[str, Any]) -> str:
    """A table: a row a length, a column a setting, and the exponents."""
    settings = list(result["peak_bytes"])
    lines = ["peak memory (MiB)".ljust(20) + "".join(f"recompute {name}".rjust(18) for name in settings)]
    for length in result["peak_bytes"][settings[0]]:
        cells = "".join(f"{result['peak_bytes'][name][length] / 2**20:>18.0f}" for name in settings)
        lines.append(f"  {length:>8} tokens   {cells}")
    lines.append(
        "  exponent p         " + "".join(f"{result['fits'][n]['exponent']:>18.2f}" for n in settings)
    )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Peak memory against length, and the fitted curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.9), layout="constrained", dpi=130)
    axis = figure.subplots()
    for setting, peaks in result["peak_bytes"].items():
        found = result["fits"][setting]
        lengths = np.linspace(0, max(peaks), 100)
        curve = (found["base"] + found["factor"] * lengths ** found["exponent"]) / 2**20
        name = f"recompute {setting}: T^{found['exponent']:.2f}"
        sizes = [peak / 2**20 for peak in peaks.values()]
        (line,) = axis.plot(list(peaks), sizes, marker="o", markersize=4, linestyle="", label=name)
        axis.plot(lengths, curve, color=line.get_color(), linewidth=1.0)
    axis.set(xlabel="tokens of the sequence", ylabel="peak memory (MiB)")
    axis.set_ylim(bottom=0)
    axis.grid(True, color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path)
