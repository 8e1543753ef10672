"""Claim 11: experts of few nodes only, what that costs in loss and saves in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench.claims import training
from dsv3.bench.claims.claim import CONTRARY, HOLDS, Claim, Measured, Options
from dsv3.bench.claims.pictures import canvas, differences, save
from dsv3.bench.claims.routes import routes
from dsv3.bench.claims.spread import at_most, spread
from dsv3.bench.claims.text import prepared
from dsv3.bench.claims.training import BASE
from dsv3.bench.paired import LENGTH
from dsv3.config.model import ModelConfig
from dsv3.plan.alltoall import route, seconds
from dsv3.plan.hardware import hardware

FREE = "any-node"
BOUND = 0.25  # %; the report calls the limit harmless and gives no figure
EXPERT_RANKS = 64  # report 3.1: eight nodes of eight


def measure(options: Options) -> Measured:
    """Groups limited to two of four against all of them; and the released model's bytes."""
    runs = training.trained((BASE, FREE), options)
    found = training.gathered(runs, options)
    for run in runs:
        read = routes(run.folder / "model", prepared(), LENGTH)
        found[run.name].setdefault("nodes_a_token", []).append(read.nodes_a_token)
        found[run.name].setdefault("nodes", read.nodes)
    change = training.changes(found, BASE, FREE)
    mean = {name: float(np.mean(row["nodes_a_token"])) for name, row in found.items()}
    limit = training.scale_of(options).config().topk_group
    kept = HOLDS if not sum(found[BASE]["nodes"][limit:]) else CONTRARY
    limited, free = released_bytes(True), released_bytes(False)
    return Measured(
        f"at most {limit} of 4 groups: {spread(change)} bits per byte; a token visits {mean[BASE]:.2f}"
        f" groups instead of {mean[FREE]:.2f}; V3 would send {limited / 1024:.0f} KiB a token and layer"
        f" between nodes instead of {free / 1024:.0f}",
        f"limit: {kept}; loss: {at_most(change, BOUND)}",
        ("experts of", "held-out bits per byte", "the limit against it (95 %)", "groups a token visits"),
        [
            (
                f"at most {limit} of 4 groups: the recipe" if name == BASE else row["what"],
                f"{np.mean(row['bits_per_byte']):.4f}", spread(change) if name != BASE else "",
                f"{mean[name]:.2f}",
            )
            for name, row in found.items()
        ],
        {"variations": found},
        training.size(options),
    )  # fmt: skip


def released_bytes(limited: bool) -> float:
    """Bytes between nodes for a token and layer of the released model, there (FP8) and back (BF16)."""
    groups: dict[str, Any] = {} if limited else {"n_group": 1, "topk_group": 1}
    config = ModelConfig.preset("v3-671b", **groups)
    way = route(config, EXPERT_RANKS, hardware("h800"))
    return seconds(config, 1, way) * way.rate


def draw(data: dict[str, Any], path: Path) -> None:
    """Groups a token visits, and the difference in the loss."""
    found = data["variations"]
    figure, (left, right) = canvas(2, 9, 2.8)
    for offset, (name, row) in zip((-0.2, 0.2), found.items()):
        counts = np.array(row["nodes"])
        places = np.arange(1, len(counts) + 1) + offset
        left.bar(
            places, 100 * counts / counts.sum(), 0.4, label=row["what"] if name != BASE else "the recipe"
        )
    left.set_xticks(range(1, len(counts) + 1))
    left.set_xlabel("groups a token visits in a layer")
    left.set_ylabel("% of tokens")
    left.legend(fontsize=7, frameon=False)
    differences(right, {"limited": training.changes(found, BASE, FREE)}, "bits per byte above unlimited, %")
    save(figure, path)


NODES = Claim(
    11, "nodes",
    "A token is sent to at most 4 nodes, so that all-to-all keeps within what can be hidden.",
    "2.1.2, 3.2.2",
    "the recipe's four groups of experts stand for nodes: two of them allowed (the report: 4 of 8) against"
    " all four; bytes from the planner, for the released widths, 64 ranks on 8 nodes, even loads",
    "Eight or sixteen small experts to choose from are not 256, so a cost in loss here is an upper view of"
    " it; the counts and bytes are exact.",
    measure, draw,
)  # fmt: skip
