"""docs/claims.md, made of the results that are there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dsv3.bench.claims.claim import Claim
from dsv3.bench.claims.registry import CLAIMS, result_of
from dsv3.common.files import write_atomic

PAGE, IMAGES = Path("docs/claims.md"), "images/claims"

HEAD = """\
# The report's claims

What the report says, the command that measures it here, and what came out. This page is written by
`dsv3 bench claims --table` from the results in `runs/claims`; nothing on it is typed by hand.

```
dsv3 bench claims --fast     # all that is not measured yet, with small runs; stop it and go on at will
dsv3 bench claims balance    # one claim, by name or number, with full runs
dsv3 bench claims --table    # this page
```

Differences between runs are paired: the same seed gives the same data in the same order. They are means ±
half of the 95 % interval (Student's t over seeds); bits per byte are better when lower. "holds here" and
"contrary here": the interval leaves out the other; "not resolved": it does not. A small model that agrees
proves little, one that disagrees as little: the last sentence of a section says what its scale can show.
"""


def write(out: Path, page: Path = PAGE) -> None:
    """Rebuild the page and the folder of its pictures."""
    results = {claim.name: result_of(claim, out) for claim in CLAIMS.values()}
    images = page.parent / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        plot = out / name / "plot.png"
        if result is not None and plot.is_file():
            shutil.copyfile(plot, images / f"{name}.png")
    parts = [HEAD, _summary(results), *(_section(claim, results[claim.name]) for claim in CLAIMS.values())]
    write_atomic(page, "\n".join(parts))


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _summary(results: dict[str, dict[str, Any] | None]) -> str:
    rows = []
    for claim in CLAIMS.values():
        result = results[claim.name]
        ours = (result["figure"], result["verdict"]) if result else ("not run", "")
        rows.append((f"[{claim.number}](#{_anchor(claim)})", claim.says, claim.where, *ours))
    return _table(("", "the report says", "section", "here", "verdict at this scale"), rows)


def _anchor(claim: Claim) -> str:
    return f"{claim.number}-{claim.name}"


def _section(claim: Claim, result: dict[str, Any] | None) -> str:
    lines = [f"## {claim.number} {claim.name}", "", f"Report {claim.where}: {claim.says}", ""]
    if result is None:
        lines += [f"Not run. `dsv3 bench claims {claim.name} --fast` measures it: {claim.ours}.", ""]
        return "\n".join(lines)
    machine = result["machine"]
    lines += [
        f"`{result['command']}`, {result['date']}, {machine['cores']} cores ({machine['cpu']})."
        " Configuration:"
        f" {claim.ours}.", "",
        *([f"Runs: {result['runs']}.", ""] if result["runs"] else []),
        _table(tuple(result["header"]), [tuple(row) for row in result["rows"]]),
        f"Here: {result['figure']}. **{result['verdict']}**", "",
        f"![{claim.name}]({IMAGES}/{claim.name}.png)", "",
        claim.limits, "",
    ]  # fmt: skip
    return "\n".join(lines)
