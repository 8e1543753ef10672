"""Claim 6: how often drafts of the MTP module stand, and what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3.bench import drafts
from dsv3.bench.claims.claim import HOLDS, Claim, Measured, Options
from dsv3.bench.claims.pictures import canvas, save
from dsv3.common.errors import UserError

MODEL, DATA = Path("runs/quickstart/model"), Path("data/tiny")
LENGTHS = (1, 2, 3)


def measure(options: Options) -> Measured:
    """Decoding with one to three drafts a step against none, on each source of the held-out text."""
    if not MODEL.is_dir():
        raise UserError(f"claim drafts needs {MODEL}: run `dsv3 quickstart` first")
    prompts, tokens, rounds = (4, 64, 2) if options.fast else (16, 128, 5)
    cut = drafts.held_out(DATA, MODEL, prompts, 64)
    found = {str(length): drafts.bench(MODEL, cut, tokens, length, rounds, threads=1) for length in LENGTHS}
    first = found["1"]["ours"]
    ratios = {source: found["1"]["ratios"][f"no-drafts:{source}:batch-1:decode"] for source in first}
    sources = ", ".join(
        f"{row['acceptance']:.0%} of {source}, {ratios[source]:.2f} times the tokens a second"
        for source, row in first.items()
    )
    rows = [
        (
            source, length, f"{row['acceptance']:.0%}", f"{row['tokens_per_step']:.2f}",
            f"{result['ratios'][f'no-drafts:{source}:batch-1:decode']:.2f}",
        )
        for source in first
        for length, result in found.items()
        for row in (result["ours"][source],)
    ]  # fmt: skip
    accepted = HOLDS if all(row["acceptance"] >= 0.85 for row in first.values()) else "lower here"
    faster = HOLDS if all(ratio > 1.5 for ratio in ratios.values()) else "not here"
    return Measured(
        f"one draft: {sources}",
        f"acceptance: {accepted}; speed: {faster}",
        ("held-out text", "drafts a step", "accepted", "tokens a step", "tokens a second, of none"),
        rows,
        {
            "lengths": {
                length: {"ours": row["ours"], "ratios": row["ratios"]} for length, row in found.items()
            }
        },
    )


def draw(data: dict[str, Any], path: Path) -> None:
    """Acceptance and speed against the number of drafts."""
    figure, (left, right) = canvas(2, 8, 2.8)
    lengths = [int(length) for length in data["lengths"]]
    results = list(data["lengths"].values())
    for source in results[0]["ours"]:
        left.plot(lengths, [100 * row["ours"][source]["acceptance"] for row in results], "o-", label=source)
        ratios = [row["ratios"][f"no-drafts:{source}:batch-1:decode"] for row in results]
        right.plot(lengths, ratios, "o-", label=source)
    right.axhline(1, color="0.6", linewidth=0.8)
    left.set_ylabel("drafts accepted, %")
    right.set_ylabel("tokens a second, of none")
    for axis in (left, right):
        axis.set_xlabel("drafts a step")
        axis.set_xticks(lengths)
        axis.legend(fontsize=8, frameon=False)
    save(figure, path)


DRAFTS = Claim(
    6, "drafts",
    "The second token is accepted 85 to 90 % of the time, for 1.8 times the tokens a second.",
    "5.4.3",
    "the quickstart's model (16.5M parameters, one MTP module, used again for the second and third draft),"
    " one answer at a time, greedy, one thread; the same tokens with and without drafts are checked",
    "Acceptance grows with how predictable text is to a model; in so small a one a draft costs nearly as"
    " much as a token (head and module are much of it), so drafts cannot pay as they do where weights are"
    " read from memory.",
    measure, draw,
)  # fmt: skip
