"""``dsv3 bench moe``: what it costs that tokens travel to experts on other ranks, and what layouts take.

The ranks are processes of this machine with one thread each, pinned to its cores in turn; with more of them
than cores, several share one. Three questions:

1. Dispatch and combine, forward and backward, as a share of a training step, and against the floor: the
   bytes that leave a rank over the bandwidth that the same process group shows in one large exchange.
2. Weak scaling: every process has as many tokens as one alone. Beside it processes that train at the same
   time and say nothing to each other: what the machine itself loses when its cores share memory and power.
   Those update all the weights each, which the others share (ZeRO-1), so together may be the faster way.
3. The same batch in several layouts, against one process.

Of the steps the fastest is shown, its slowest rank's time: neighbours on a machine spoil the others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3.bench.machine import machine
from dsv3.bench.ranks import run_ranks
from dsv3.common.progress import Progress

MODEL = {"preset": "tiny", "vocab_size": 2048}
ROWS = ("fp32", "bf16", "fp8")
# Layouts of the same batch by their number of processes.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "data 2": {},
        "data 2, zero 3": {"zero": 3},
        "expert 2": {"expert": 2},
        "pipeline 2": {"pipeline": 2},
    },
    4: {
        "data 4": {},
        "expert 4": {"expert": 4},
        "data 4, expert 2": {"expert": 2},
        "pipeline 2, expert 2": {"pipeline": 2, "expert": 2},
    },
}


def cases_of(ranks: int, sequences: int) -> dict[str, dict[str, Any]]:
    """What ``ranks`` processes run: alone, together on as many tokens each, and the layouts of one batch."""
    plain = {"parallel": {}, "sequences": sequences, "alone": False, "fp8_rows": False, "trips": False}
    cases = {"alone": {**plain, "alone": True}}
    if ranks > 1:
        wide = {**plain, "parallel": {"expert": ranks}, "sequences": ranks * sequences}
        cases |= {"fp32": {**wide, "trips": True}, "fp8": {**wide, "fp8_rows": True}}
        cases |= {name: {**plain, "parallel": how} for name, how in LAYOUTS.get(ranks, {}).items()}
    return cases


def bench(
    ranks: Sequence[int],
    sequences: int,
    length: int,
    steps: int,
    out: Path,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run it and write ``moe.png`` below ``out``; times are in seconds.

    ``sequences`` of ``length`` tokens: of a process, a step.
    ``model``: of a recipe; None: tiny with a small vocabulary.
    """
    ran: dict[int, list[dict[str, Any]]] = {}
    with Progress("bench moe", sum(ranks), "processes") as progress:
        for count in ranks:
            job = {
                "model": model or MODEL, "length": length, "steps": steps,
                "cases": cases_of(count, sequences),
            }  # fmt: skip
            ran[count] = run_ranks("dsv3.bench.moe_worker", job, count, f"{count} processes")
            progress.advance(count)
    result = {**measured(ran, sequences * length), "peers": {}, "machine": machine()}
    out.mkdir(parents=True, exist_ok=True)
    draw(result, out / "moe.png")
    return {**result, "picture": str(out / "moe.png")}


def measured(ran: dict[int, list[dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """The three tables from what the ranks reported, and their ratios; ``tokens`` a process and step."""
    cores = os.cpu_count() or 1
    one = _fastest(ran[1], "alone") if 1 in ran else None
    travel: list[dict[str, Any]] = []
    weak: list[dict[str, Any]] = []
    layouts: list[dict[str, Any]] = []
    for count, found in ran.items():
        alone = _fastest(found, "alone")
        together = _fastest(found, "fp32") if count > 1 else alone
        weak.append(
            {
                "processes": count,
                "step_seconds": together,
                "silent_step_seconds": alone,
                "tokens_per_second": count * tokens / together,
                "silent_tokens_per_second": count * tokens / alone,
            }
        )
        layouts += [
            {"layout": name, "processes": count, "step_seconds": _fastest(found, name)}
            for name in LAYOUTS.get(count, {})
            if name in found[0]
        ]
        travel += [_travel(found, count, rows) for rows in ROWS if count > 1]
    ratios = {f"floor:{row['processes']} processes, {row['rows']}": row["over_floor"] for row in travel}
    for row in weak:
        ratios[f"silent:{row['processes']} processes"] = row["step_seconds"] / row["silent_step_seconds"]
    if one is not None:
        ratios |= {f"one process:{row['layout']}": row["step_seconds"] / one for row in layouts}
    return {
        "ratios": ratios,
        "ours": {"travel": travel, "weak": weak, "layouts": layouts, "one_process_seconds": one},
        "cores": cores,
        "tokens_a_process": tokens,
    }


def _fastest(found: list[dict[str, Any]], case: str) -> float:
    """A case's fastest step, as long as its slowest rank took."""
    return min(max(step) for step in zip(*(rank[case]["seconds"] for rank in found)))


def _travel(found: list[dict[str, Any]], count: int, rows: str) -> dict[str, Any]:
    """Trips of all layers of a step: alone, their floor, and what they are of a step."""
    trips = [rank["fp32"]["trips"] for rank in found]
    layers = found[0]["fp32"]["layers"]
    seconds = layers * max(trip[rows]["seconds"] for trip in trips)
    sent = layers * max(trip[rows]["bytes"] for trip in trips)
    rate = min(trip["rate"] for trip in trips)
    row = {
        "processes": count,
        "rows": rows,
        "bytes": sent,
        "bytes_per_second": rate,
        "floor_seconds": sent / rate,
        "seconds": seconds,
        "over_floor": seconds * rate / sent,
        "sorting_seconds": layers * max(trip[rows]["sorting"] for trip in trips),
    }
    if rows in found[0]:  # a step in which rows travel so
        row["step_seconds"] = _fastest(found, rows)
        row["share"] = seconds / row["step_seconds"]
        row["waiting_share"] = max(
            min(w / s for w, s in zip(rank[rows]["waited"], rank[rows]["seconds"])) for rank in found
        )
    return row


def report(result: dict[str, Any]) -> str:
    """Three tables for people."""
    ours, cores = result["ours"], result["cores"]
    lines = [
        f"{result['tokens_a_process']} tokens a process, {cores} cores, a thread a process",
        "",
        "dispatch + combine, forward and backward, of all layers of a step",
        "  processes  rows   sent a rank   bandwidth     floor     alone / floor   sorting      step   share",
    ]
    for row in ours["travel"]:
        step = f"{1e3 * row['step_seconds']:>7.0f} ms {row['share']:>6.1%}" if "share" in row else ""
        lines.append(
            f"  {row['processes']:>9}  {row['rows']:<6} {row['bytes'] / 2**20:>7.1f} MiB "
            f"{row['bytes_per_second'] / 1e9:>6.2f} GB/s {1e3 * row['floor_seconds']:>6.1f} ms "
            f"{1e3 * row['seconds']:>6.1f} ms {row['over_floor']:>6.2f} "
            f"{1e3 * row['sorting_seconds']:>6.1f} ms {step}"
        )
    lines += ["", "weak scaling, experts shared by all; silent: processes that say nothing to each other"]
    lines.append("  processes     step   tokens/s    silent   tokens/s  together / silent")
    for row in ours["weak"]:
        lines.append(
            f"  {row['processes']:>9} {1e3 * row['step_seconds']:>5.0f} ms {row['tokens_per_second']:>10,.0f}"
            f" {1e3 * row['silent_step_seconds']:>6.0f} ms {row['silent_tokens_per_second']:>10,.0f}"
            f" {row['tokens_per_second'] / row['silent_tokens_per_second']:>18.2f}"
        )
    if ours["one_process_seconds"]:
        lines += ["", f"the same batch: one process takes {1e3 * ours['one_process_seconds']:.0f} ms a step"]
        for row in ours["layouts"]:
            times = row["step_seconds"] / ours["one_process_seconds"]
            floor = 1 / min(row["processes"], cores)
            lines.append(
                f"  {row['layout']:<22} {1e3 * row['step_seconds']:>5.0f} ms, {times:.2f} of it "
                f"(its cores alone would allow {floor:.2f})"
            )
    return "\n".join([*lines, f"picture: {result['picture']}"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Trips against their floor, weak scaling, and layouts."""
    from matplotlib.figure import Figure

    ours, one = result["ours"], result["ours"]["one_process_seconds"]
    figure = Figure(figsize=(10.5, 3.6), layout="constrained", dpi=130)
    left, middle, right = figure.subplots(1, 3)
    names = [f"{row['processes']} x {row['rows']}" for row in ours["travel"]]
    left.barh(names, [1e3 * row["seconds"] for row in ours["travel"]], color="0.75", label="measured")
    left.barh(
        names, [1e3 * row["floor_seconds"] for row in ours["travel"]], color="C0", label="bytes / bandwidth"
    )
    left.set(xlabel="ms a step", title="dispatch + combine")
    left.invert_yaxis()
    counts = [row["processes"] for row in ours["weak"]]
    for key, label, style in (
        ("silent_tokens_per_second", "saying nothing to each other", "--"),
        ("tokens_per_second", "sharing experts", "-"),
    ):
        middle.plot(counts, [row[key] for row in ours["weak"]], style, marker="o", markersize=4, label=label)
    middle.axvline(result["cores"], color="0.7", linewidth=0.8)
    middle.annotate("cores", (result["cores"], 0), (3, 3), textcoords="offset points", color="0.5")
    middle.set(xlabel="processes", title="tokens a second, the same tokens a process")
    middle.set_xticks(counts)
    middle.set_ylim(bottom=0)
    if one:
        names = ["one process", *(row["layout"] for row in ours["layouts"])]
        right.barh(names, [1e3 * one, *(1e3 * row["step_seconds"] for row in ours["layouts"])], color="C2")
        right.set(xlabel="ms a step", title="the same batch")
        right.invert_yaxis()
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    left.legend(frameon=False, fontsize=8)
    middle.legend(frameon=False, fontsize=8)
    figure.savefig(path)
