"""Claims 3 and 4: balance by biases, by an auxiliary loss of each sequence, and of the batch as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsv3.bench.claims import training
from dsv3.bench.claims.claim import Claim, Measured, Options
from dsv3.bench.claims.pictures import canvas, curves, differences, save
from dsv3.bench.claims.routes import routes
from dsv3.bench.claims.spread import above, spread
from dsv3.bench.claims.text import prepared
from dsv3.bench.claims.training import BASE
from dsv3.bench.paired import LENGTH

ALPHAS = ("aux-1e-3", "aux-1e-2", "aux-1e-1")
SWEPT = (BASE, *ALPHAS, "unbalanced")
BY_SEQUENCE, BY_BATCH = "aux-1e-2", "batch-aux-1e-2"
TITLES = {BASE: "biases", BY_SEQUENCE: "auxiliary loss by sequence", BY_BATCH: "auxiliary loss by batch"}


def measure_balance(options: Options) -> Measured:
    """Biases against every alpha: held-out loss and MaxVio."""
    found = training.gathered(training.trained(SWEPT, options), options)
    best = min(ALPHAS, key=lambda name: float(np.mean(found[name]["bits_per_byte"])))
    change = training.changes(found, best, BASE)
    violation = {name: float(np.mean(row["max_violation"])) for name, row in found.items()}
    return Measured(
        f"the best alpha ({best.removeprefix('aux-')}) {spread(change)} bits per byte above the biases;"
        f" MaxVio {violation[best]:.2f} against {violation[BASE]:.2f}, {violation['unbalanced']:.2f} without"
        " either",
        above(change),
        ("balanced by", "held-out bits per byte", "above the biases' (95 %)", "MaxVio, last quarter"),
        [
            (
                row["what"], f"{np.mean(row['bits_per_byte']):.4f}",
                spread(training.changes(found, name, BASE)) if name != BASE else "", f"{violation[name]:.2f}",
            )
            for name, row in found.items()
        ],
        {"variations": found},
        training.size(options),
    )  # fmt: skip


def draw_balance(data: dict[str, Any], path: Path) -> None:
    """MaxVio over the steps, and differences in the loss."""
    found = data["variations"]
    figure, (left, right) = canvas(2)
    curves(left, {name: row["violation_series"] for name, row in found.items()}, 10, "MaxVio")
    left.set_yscale("log")
    rows = {name: training.changes(found, name, BASE) for name in found if name != BASE}
    differences(right, rows, "held-out bits per byte above the biases', %")
    save(figure, path)


def measure_batch(options: Options) -> Measured:
    """Loss of the three ways to balance, and how far their experts tell the sources apart."""
    runs = training.trained((BASE, BY_SEQUENCE, BY_BATCH), options)
    found = training.gathered(runs, options)
    for run in runs:
        read = routes(run.folder / "model", prepared(), LENGTH)
        found[run.name].setdefault("distance", []).append(read.distance)
        found[run.name].setdefault("load", read.load)  # the first seed's, for the heat map
    apart = {name: row["distance"] for name, row in found.items()}
    wider = {name: [a - b for a, b in zip(apart[name], apart[BY_SEQUENCE])] for name in (BASE, BY_BATCH)}
    loss = {name: training.changes(found, BY_SEQUENCE, name) for name in (BASE, BY_BATCH)}
    return Measured(
        f"by sequence {spread(loss[BY_BATCH])} bits per byte above by batch, {spread(loss[BASE])} above the"
        f" biases; distance between sources' loads {np.mean(apart[BY_SEQUENCE]):.2f} by sequence,"
        f" {spread(wider[BY_BATCH], '')} more by batch,"
        f" {spread(wider[BASE], '')} more with the biases",
        f"loss: {above(loss[BY_BATCH])}; specialisation: {above(wider[BY_BATCH])}",
        ("balanced by", "held-out bits per byte", "sources' loads apart (0 to 1)", "MaxVio, last quarter"),
        [
            (
                row["what"], f"{np.mean(row['bits_per_byte']):.4f}", f"{np.mean(row['distance']):.3f}",
                f"{np.mean(row['max_violation']):.2f}",
            )
            for row in found.values()
        ],
        {"variations": found},
        training.size(options),
    )  # fmt: skip


def draw_batch(data: dict[str, Any], path: Path) -> None:
    """Heat maps: how much of each source an expert of the last layer takes, 1 when even."""
    found = data["variations"]
    figure, axes = canvas(len(found), 11, 2.4)
    for axis, (name, row) in zip(axes, found.items()):
        share = np.array([layers[-1] for layers in row["load"].values()])
        image = axis.imshow(share * share.shape[1], cmap="magma", vmin=0, vmax=3, aspect="auto")
        axis.set_yticks(range(len(share)), list(row["load"]))
        axis.set_xlabel("expert of the last layer, first seed")
        axis.set_title(TITLES[name], fontsize=9)
    figure.colorbar(image, ax=axes, label="load, 1 when even", extend="max")
    save(figure, path)


BALANCE = Claim(
    3, "balance",
    "Balancing without an auxiliary loss gives a better model than an auxiliary loss does.",
    "4.5.2, table 5",
    "the recipe, balanced by the biases (gamma 0.01), by a sequence-wise auxiliary loss alone (alpha"
    " swept), or by nothing; everything else equal, so are the active FLOPs",
    "A few hundred thousand tokens show how evenly experts are used and what balancing costs at once; they"
    " say nothing about what experts become over 14.8T tokens, where the report sees the gain.",
    measure_balance, draw_balance,
)  # fmt: skip

BATCH = Claim(
    4, "batch",
    "Balance asked of each sequence costs: validation loss 2.258 by sequence, 2.253 by batch and 2.253"
    " with the biases (1B model); 2.085, 2.080 and 2.080 (3B). Without it experts specialise more.",
    "4.5.3, figure 9",
    "as for claim 3, alpha 1e-2 for both losses (`model.seq_aux`); load of every expert by source on held-out"
    " code, prose and exercises",
    "The report's differences in loss are 0.2 %, far less than the spread of three so short runs; how far"
    " loads of sources lie apart is plain to see, since these sources differ more than the Pile's.",
    measure_batch, draw_batch,
)  # fmt: skip
