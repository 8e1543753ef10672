"""Every claim, by name, in the order of its number; measuring one and keeping what came out."""

from __future__ import annotations

import datetime
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv3.bench.claims.acceptance import DRAFTS
from dsv3.bench.claims.balance import BALANCE, BATCH
from dsv3.bench.claims.bubbles import BUBBLES
from dsv3.bench.claims.cache import CACHE
from dsv3.bench.claims.claim import SEEDS, Claim, Options
from dsv3.bench.claims.counting import COST, COUNTS
from dsv3.bench.claims.fp8 import FP8, FP8_BLOCKS
from dsv3.bench.claims.late import LATE
from dsv3.bench.claims.mtp import MTP
from dsv3.bench.claims.needles import NEEDLES
from dsv3.bench.claims.nodes import NODES
from dsv3.bench.claims.post import POST
from dsv3.bench.claims.retiling import RETILING
from dsv3.bench.machine import machine
from dsv3.common.errors import UserError, nearest
from dsv3.common.files import write_json

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        COUNTS, CACHE, BALANCE, BATCH, MTP, DRAFTS, FP8, FP8_BLOCKS, RETILING, BUBBLES, NODES, NEEDLES, POST,
        COST, LATE,
    )
}  # fmt: skip


def named(name: str) -> Claim:
    """A claim by name or number."""
    for claim in CLAIMS.values():
        if name in (claim.name, str(claim.number)):
            return claim
    known = ", ".join(f"{claim.number} {claim.name}" for claim in CLAIMS.values())
    raise UserError(f"claim {name!r} is unknown{nearest(name, CLAIMS)}; there are {known}")


def command(claim: Claim, options: Options) -> str:
    """The words that measure a claim with these options."""
    seeds = [word for seed in options.seeds for word in ("--seed", str(seed))]
    seeds = [] if options.seeds == SEEDS else seeds
    return shlex.join(["dsv3", "bench", "claims", claim.name, *(["--fast"] if options.fast else []), *seeds])


def result_of(claim: Claim, out: Path) -> dict[str, Any] | None:
    """What was measured before, None where nothing was."""
    path = out / claim.name / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def measure(claim: Claim, options: Options) -> dict[str, Any]:
    """Measure a claim; write ``OUT/NAME/result.json`` and ``plot.png``."""
    result = {
        **asdict(claim.measure(options)),
        "command": command(claim, options),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }
    claim.draw(result["data"], options.out / claim.name / "plot.png")
    write_json(options.out / claim.name / "result.json", result)
    return result
