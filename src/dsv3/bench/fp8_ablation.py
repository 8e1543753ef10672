"""``dsv3 bench fp8 --ablation``: what each choice of FP8 training does to the loss (report 3.3 and B).

The tiny model in FP32 and in variations that are some ``fp8.*`` keys away from each other
(:mod:`dsv3.bench.paired`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench.machine import machine
from dsv3.bench.paired import Run, by_name, check, held_out, losses, runs_of, train
from dsv3.common.errors import UserError
from dsv3.common.files import write_json

GOAL_PERCENT = 0.25  # published: the loss of FP8 stays this near to BF16's
SMOOTH = 100  # steps
WITHOUT_MTP = ("--model.num_nextn_predict_layers", "0")  # its second head would be half of the time

FP8 = ("--precision", "fp8")
REFERENCE = "fp32"
# Name, what it is, and its keys.
VARIATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    REFERENCE: ("FP32, the reference", ()),
    "fp32-reordered": (
        "FP32, gradients summed in two halves: what rounding alone does",
        ("--batch.micro_sequences", "4"),
    ),
    "fp32-bf16-moments": (
        "FP32, AdamW's moments in BF16 as in every FP8 run",
        ("--optimizer.moments", "bf16"),
    ),
    "fp8": ("FP8, the report's recipe", FP8),
    "tensor-scales": (
        "FP8, one scale a tensor",
        (*FP8, *(f"--fp8.{what}_tile=tensor" for what in ("activation", "weight", "gradient"))),
    ),
    "gradient-blocks": ("FP8, gradients in 128x128 blocks", (*FP8, "--fp8.gradient_tile", "128x128")),
    "attention-e4m3": ("FP8, E4M3 kept after attention", (*FP8, "--fp8.attention_output", "e4m3")),
    "14-bit-promoted": (
        "FP8, tensor cores' 14-bit sums imitated, promoted every 128",
        (*FP8, "--fp8.accumulation", "emulated"),
    ),
    "14-bit": (
        "FP8, tensor cores' 14-bit sums imitated, never promoted",
        (*FP8, "--fp8.accumulation", "emulated-unpromoted"),
    ),
}  # fmt: skip


def variation(name: str) -> tuple[str, ...]:
    """The words of a variation."""
    return (*WITHOUT_MTP, *VARIATIONS[name][1])


def ablation(
    out: Path, steps: int, seeds: list[int], data: str, workers: int, only: list[str]
) -> dict[str, Any]:
    """Train every variation (or those of ``only`` and the reference) from every seed, then compare."""
    check(data)
    unknown = [name for name in only if name not in VARIATIONS]
    if unknown:
        raise UserError(f"--only ({unknown[0]}) is no variation; there are {', '.join(VARIATIONS)}")
    names = [name for name in VARIATIONS if not only or name in only or name == REFERENCE]
    runs = runs_of({name: variation(name) for name in names}, seeds, out)
    train(runs, steps, data, workers, "ablation")
    result = compare(runs)
    write_json(out / "result.json", result)
    draw(runs, out / "loss_gap.png")
    return result


def smooth(values: np.ndarray, width: int = SMOOTH) -> np.ndarray:
    """Mean over windows of ``width`` steps (only whole ones)."""
    return np.convolve(values, np.ones(width) / width, mode="valid")


def gap_percent(loss: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far a smoothed loss is above the smoothed reference, in percent of it; step by step."""
    steps = min(len(loss), len(reference))
    width = min(SMOOTH, max(1, steps // 4))
    smoothed = smooth(reference[:steps], width)
    return 100 * (smooth(loss[:steps], width) - smoothed) / smoothed


def compare(runs: list[Run]) -> dict[str, Any]:
    """Every variation's gap to the reference: at the end, at its greatest, and on held-out text."""
    rows: dict[str, Any] = {}
    for name, pairs in by_name(runs, REFERENCE).items():
        gaps: dict[str, list[float]] = {"final": [], "greatest": [], "held_out": []}
        for run, reference in pairs:
            gap = gap_percent(losses(run), losses(reference))
            after = gap[len(gap) // 10 :]  # the first steps only show how fast everything falls
            gaps["final"].append(float(gap[-1]))
            gaps["greatest"].append(float(after[np.abs(after).argmax()]) if len(after) else math.nan)
            gaps["held_out"].append(100 * (held_out(run) / held_out(reference) - 1))
        rows[name] = {
            "what": VARIATIONS[name][0],
            "seeds": [run.seed for run, _ in pairs],
            "steps": min(len(losses(run)) for run, _ in pairs),
            "final_loss": float(np.mean([losses(run)[-SMOOTH:].mean() for run, _ in pairs])),
            "held_out_bits_per_byte": [held_out(run) for run, _ in pairs],
            **{f"{which}_gap_percent": values for which, values in gaps.items()},
        }
    return {"goal_percent": GOAL_PERCENT, "variations": rows, "machine": machine("cpu")}


def _with_error(values: list[float]) -> str:
    """The mean, and with several values its standard error."""
    error = f" +-{np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.2f}{error} %"


def report(result: dict[str, Any]) -> str:
    """The comparison as a table."""
    lines = [
        f"{'means over seeds, with their standard errors':<62} seeds steps   loss"
        f"  {'gap at end':>15}  {'greatest gap':>15}  {'held-out gap':>15}"
    ]
    for row in result["variations"].values():
        gaps = (_with_error(row[f"{which}_gap_percent"]) for which in ("final", "greatest", "held_out"))
        numbers = "  ".join(f"{gap:>15}" for gap in gaps)
        lines.append(
            f"{row['what']:<62} {len(row['seeds']):>5} {row['steps']:>5}  {row['final_loss']:.3f}  {numbers}"
        )
    lines.append(f"published for FP8 against BF16: within {result['goal_percent']} %")
    return "\n".join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Gaps of the smoothed losses against steps: means over seeds, and thin lines for each of several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained", dpi=130)
    axis = figure.subplots()
    axis.axhspan(-GOAL_PERCENT, GOAL_PERCENT, color="0.93", label=f"within {GOAL_PERCENT} %")
    for number, (name, pairs) in enumerate(by_name(runs, REFERENCE).items()):
        if name == REFERENCE:
            continue
        color, width = ("black", 2.2) if name == "fp8" else (f"C{number - 1}", 1.2)
        gaps = [gap_percent(losses(run), losses(reference)) for run, reference in pairs]
        shortest = min(map(len, gaps))
        last = min(len(losses(run)) for run, _ in pairs)
        steps = np.arange(shortest) + last - shortest
        mean = np.mean([gap[:shortest] for gap in gaps], axis=0)
        label = VARIATIONS[name][0] + (f" ({len(gaps)} seeds)" if len(gaps) > 1 else "")
        axis.plot(steps, mean, label=label, color=color, linewidth=width)
        if len(gaps) > 1:
            for gap in gaps:
                thin = axis.plot(steps, gap[:shortest], color=color, linewidth=0.5, alpha=0.4)
            thin[0].set_label("each seed of it")
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss above FP32's, % (means of {SMOOTH} steps)")
    axis.grid(True, color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
