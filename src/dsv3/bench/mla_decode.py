"""``dsv3 bench mla``: bytes a second of attention over the paged cache on a GPU, beside copying memory.

A decoding step reads each sequence's rows once and little else, so what memory can do bounds it, up to some
number of heads: with all 128 of DeepSeek-V3 on one GPU the products take as long. "Ours" is the Triton
kernel, whatever ``dsv3.serve.absorbed`` would take. A cache that is small exists several times, as layers, so
that it comes from memory and not from a cache of the GPU's.

Shapes: S sequences, L keys of each, T new tokens of each, H heads.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv3.bench.fp8_gemm import copies
from dsv3.bench.gpu_timer import Calls, Timer, graphs_in_turns
from dsv3.bench.machine import machine
from dsv3.common.errors import Failure, UserError
from dsv3.common.progress import Progress
from dsv3.ops.paged import Table
from dsv3.serve import absorbed
from dsv3.serve.cache import LatentCache, row_bytes
from dsv3.serve.options import GPU_BLOCK_SIZE

LATENT, ROPE = 512, 64  # DeepSeek-V3's
COPIED = 2**30  # bytes
OURS = "triton"


class Case(NamedTuple):
    """A step's attention in one layer."""

    heads: int
    sequences: int
    keys: int
    new: int = 1
    cache: str = "bfloat16"

    def __str__(self) -> str:
        drafts = f", {self.new} tokens each" if self.new > 1 else ""
        return f"{self.cache}, {self.heads} heads, {self.sequences} x {self.keys} keys{drafts}"

    @property
    def nbytes(self) -> int:
        """Read and written: rows of the cache, queries, results."""
        rows = self.sequences * self.keys * row_bytes(LATENT, ROPE, self.cache)
        return rows + 2 * self.sequences * self.new * self.heads * (2 * LATENT + ROPE)


CASES = (
    *(Case(heads, *size) for heads in (16, 64, 128) for size in ((1, 65536), (32, 4096), (128, 4096))),
    Case(16, 32, 4096, new=2),
    Case(128, 32, 4096, new=2),
    *(Case(heads, 32, 4096, cache="fp8") for heads in (16, 128)),
)


def gpu() -> torch.device:
    """The current GPU, or one clear line."""
    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA device, and there is none")
    return torch.device("cuda", torch.cuda.current_device())


def contestants(case: Case, device: torch.device) -> tuple[dict[str, Calls], dict[str, str]]:
    """Every implementation for a case, the gathering one among them; and why others are not."""
    blocks = -(-case.keys // GPU_BLOCK_SIZE)
    slots = case.sequences * blocks * GPU_BLOCK_SIZE
    cache = LatentCache(
        copies(case.nbytes), slots, LATENT, ROPE, case.cache, torch.bfloat16, device, GPU_BLOCK_SIZE
    )
    latent, rope = torch.randn(slots, LATENT, device=device), torch.randn(slots, ROPE, device=device)
    for layer in range(len(cache.rows)):
        cache.write(layer, torch.arange(slots, device=device), latent.bfloat16(), rope.bfloat16())
    order = np.random.default_rng(0).permutation(case.sequences * blocks).reshape(case.sequences, blocks)
    places = (order[..., None] * GPU_BLOCK_SIZE + np.arange(GPU_BLOCK_SIZE)).reshape(case.sequences, -1)
    table = Table.of(list(places), [case.keys] * case.sequences, GPU_BLOCK_SIZE, 0, device)
    shape = (case.sequences * case.new, case.heads, LATENT + ROPE)
    q_MHX, scale = torch.randn(shape, device=device).bfloat16(), (LATENT + ROPE) ** -0.5
    choice = absorbed.choose(absorbed.sizes_of(q_MHX, cache))
    found: dict[str, Calls] = {}
    layers = range(len(cache.rows))
    for name in choice.order:
        if name == "reference":
            found[name] = [
                partial(absorbed.attend_reference, q_MHX, cache, layer, table, scale) for layer in layers
            ]
        else:
            attend = absorbed.implementation(name).attend
            found[name] = [partial(attend, q_MHX, cache.rows[n], table, LATENT, scale) for n in layers]
    return found, choice.refused


def bench(rounds: int = 9, cases: tuple[Case, ...] = CASES, timer: Timer = graphs_in_turns) -> dict[str, Any]:
    """GB/s of every case and implementation, and their share of what copying reaches."""
    device = gpu()
    speeds: dict[str, dict[str, float]] = {}
    refused: dict[str, dict[str, str]] = {}
    with Progress("bench mla", len(cases) + 1, "cases") as progress:
        source = torch.empty(COPIED, dtype=torch.uint8, device=device)
        copy: Calls = [partial(torch.empty_like(source).copy_, source)]
        copied = 2 * COPIED / median(timer({"copy": copy}, rounds)["copy"])
        progress.advance(1)
        for case in cases:
            found, why = contestants(case, device)
            if OURS not in found:
                reason = why.get(OURS, f"{absorbed.VARIABLE} does not ask for it")
                raise Failure(f"our kernel cannot be measured, {case}: {reason}")
            try:
                seconds = timer(found, rounds)
            except RuntimeError as error:
                raise Failure(f"{case} stopped: {str(error).splitlines()[0]}") from error
            speeds[str(case)] = {name: case.nbytes / median(taken) for name, taken in seconds.items()}
            refused[case.cache] = why
            progress.advance(1)
    return {**summary(speeds, copied), "refused": refused, "machine": machine("cuda")}


def summary(speeds: dict[str, dict[str, float]], copied: float) -> dict[str, Any]:
    """Speeds by case and implementation, as the JSON has them; ``copied``: bytes a second."""
    ours = {case: each[OURS] / 1e9 for case, each in speeds.items()}
    peers: dict[str, Any] = {"copy": copied / 1e9}
    ratios = {f"copy:{case}": speed / peers["copy"] for case, speed in ours.items()}
    for case, each in speeds.items():
        for name, speed in each.items():
            if name != OURS:
                peers.setdefault(name, {})[case] = speed / 1e9
                ratios[f"{name}:{case}"] = each[OURS] / speed
    return {"ratios": ratios, "ours": ours, "peers": peers, "unit": "GB/s"}


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    peers, copied = result["peers"], result["peers"]["copy"]
    others = [name for name in peers if name != "copy"]
    width = max(len(case) for case in result["ours"])
    lines = [f"{'GB/s':<{width}}    ours  of copying  " + "  ".join(f"{name:>9}" for name in others)]
    for case, speed in result["ours"].items():
        cells = [peers[name].get(case) for name in others]
        text = "  ".join(f"{'-' if cell is None else f'{cell:.0f}':>9}" for cell in cells)
        lines.append(f"{case:<{width}}  {speed:>6.0f}  {speed / copied:>10.0%}  {text}")
    lines.append(f"copying reads and writes {copied:.0f} GB/s")
    for cache, reasons in result["refused"].items():
        lines += [f"not measured, {cache} by {name}: {why}" for name, why in reasons.items()]
    return "\n".join(lines)
