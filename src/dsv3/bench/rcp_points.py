"""The reference points of ``dsv3 bench rcp`` and what was measured beside them: JSON, and a page made of it.

``recipes/rcp-tiny.json`` holds the hash of the recipe's content that the points belong to, the reference, and
the leaderboard's rows; each with steps of every seed, hardware, commit and date.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dsv3.common.errors import UserError
from dsv3.common.files import write_atomic, write_json

PAGE = Path("docs/leaderboard.md")

HEAD = """\
# Leaderboard

How many steps, and how long, from initial weights to a held-out log-perplexity of {target:g} nats a token:
`recipes/rcp-tiny.yaml`, a benchmark of MLPerf's kind that takes minutes of one core a seed. This page is
written by `dsv3 bench rcp` from `recipes/rcp-tiny.json`; nothing on it is typed by hand.

```
dsv3 data fetch recipes/manifest-kjv.yaml --to data/prose
dsv3 data prepare recipes/rcp-data.yaml
dsv3 bench rcp --seeds 5                                   # train, check; exit status 1 if it does not pass
dsv3 bench rcp --seeds 5 --note "what I changed"           # and add a row here
dsv3 bench rcp --seeds 5 --optimizer.lr 1e-3               # any key of the recipe: a change to be judged
dsv3 bench rcp --seeds 10 --reference                      # make these runs the reference points
```

Stop it and go on at will: seeds that are done are not trained again. Of the steps the fastest and the slowest
seed are left out, and the mean of the rest has to lie where a t-test at 5 % cannot tell it from the reference
points' (MLPerf's rule for the fast side, held here on the slow side too). Steps compare on any machine;
seconds, of training without readings of held-out text, only on the same.

MLPerf's own benchmark of this kind is stated in `recipes/mlperf-v3-671b.yaml` and has never been run here.
`log.report_to: mlperf` makes any pre-training run write `OUT/mlperf.log`, which MLPerf's compliance checker
reads (`pip install 'dsv3[mlperf]'`):

```
python -m mlperf_logging.compliance_checker --ruleset 6.0.0 OUT/mlperf.log
```

## Table

"""


@dataclass
class Points:
    """The file's content; ``reference`` is empty before there is one. ``recipe``: hash of the recipe."""

    path: Path
    recipe: str
    reference: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, recipe: Path) -> Points:
        """Read the file, if there is one.

        A recipe whose content is another than the reference was taken with leaves no reference and no rows.
        """
        digest = content(recipe)
        if not path.is_file():
            return cls(path, digest)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            points = cls(path, found["recipe_sha256"], found["reference"], found["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} holds no reference points ({type(error).__name__}): restore it"
            ) from None
        return points if points.recipe == digest else cls(path, digest)

    def add(self, row: dict[str, Any]) -> None:
        """A row of the leaderboard; there must be something to compare it with."""
        if not self.reference:
            raise UserError(
                f"--note: {self.path} has no reference points of this recipe; use --reference first"
            )
        self.rows.append(row)

    def save(self, page: Path = PAGE) -> None:
        """Write the file and the page."""
        write_json(self.path, {"recipe_sha256": self.recipe, "reference": self.reference, "rows": self.rows})
        write_atomic(page, HEAD.format(target=self.reference["target"]) + table(self))


def content(recipe: Path) -> str:
    """SHA-256 of what a YAML file says, whatever its comments."""
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def table(points: Points) -> str:
    """The reference and the rows, in the order they came."""
    header = ("date", "commit", "change", "seeds", "steps: mean ± deviation", "seconds", "hardware", "check")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in (points.reference, *points.rows):
        lines.append(f"| {' | '.join(_cells(row))} |")
    reference = ", ".join(str(n) for n in points.reference["steps"])
    return "\n".join([*lines, "", f"Steps of the reference's seeds: {reference}.", ""])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    steps = [n for n in row["steps"] if n is not None]
    spread = f" ± {np.std(steps, ddof=1):.1f}" if len(steps) > 1 else ""
    mean = f"{np.mean(steps):.1f}{spread}" if steps else "not reached"
    if lost := len(row["steps"]) - len(steps):
        mean += f", {lost} not reached"
    change = row["note"] + (f" (`{' '.join(row['words'])}`)" if row["words"] else "")
    threads = row["machine"]["threads"]
    hardware = f"{threads} thread{'s' * (threads != 1)} of {row['machine']['cpu']}"
    verdict = row["check"]["verdict"] if "check" in row else "reference"
    seconds = f"{np.mean(row['seconds']):.0f}"
    return (row["date"], row["commit"], change, str(len(row["seeds"])), mean, seconds, hardware, verdict)
