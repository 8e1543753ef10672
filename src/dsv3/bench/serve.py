"""``dsv3 bench serve``: a server under a Poisson load, with the MTP module's drafts and without, in turns.

Answers are greedy, so that with drafts and without the server writes the same tokens.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.bench.load import Outcome, Target, arrivals, between_pieces, per_token, prompts, run, summary
from dsv3.bench.machine import machine
from dsv3.bench.server import Server
from dsv3.common.errors import Failure, UserError
from dsv3.common.progress import Progress

MODULES = ("argparse", "ast", "inspect", "subprocess", "tarfile", "typing")  # text when none is named
OFF = "mtp off"
TIMES = ("time_to_first_token", "time_per_token", "time_between_pieces", "end_to_end")


@dataclass(frozen=True)
class Load:
    """``rate``: requests a second, for ``seconds`` or until ``requests`` (if not 0). ``prompt_length``:
    characters; ``prefix_share``: the part of a prompt that is the same in all. ``max_tokens``: an answer's.
    ``text``: what prompts are cut from.
    """

    rate: float
    seconds: float
    requests: int
    prompt_length: int
    prefix_share: float
    max_tokens: int
    seed: int
    text: str

    def __post_init__(self) -> None:
        for name, value, good in (
            ("--rate", self.rate, self.rate > 0),
            ("--seconds", self.seconds, self.seconds > 0),
            ("--prefix-share", self.prefix_share, 0 <= self.prefix_share <= 1),
        ):
            if not good:
                limit = "from 0 to 1" if name == "--prefix-share" else "above 0"
                raise UserError(f"{name} ({value:g}) must be {limit}")
        if not self.schedule(0)[1]:
            raise UserError(f"no request arrives within --seconds ({self.seconds:g}); raise it, or --rate")

    def schedule(self, number: int) -> tuple[list[dict[str, Any]], list[float]]:
        """Bodies and arrival times of the run with that number."""
        times = arrivals(self.rate, self.seconds, self.requests, self.seed + number)
        texts = prompts(self.text, len(times), self.prompt_length, self.prefix_share, self.seed + number)
        return [{"prompt": text, "max_tokens": self.max_tokens, "temperature": 0} for text in texts], times


def default_text() -> str:
    """Source of Python's standard library, the same on every machine with the same Python."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)


def bench(where: Path | Target, load: Load, draft_tokens: int = 1, rounds: int = 2) -> dict[str, Any]:
    """Figures of a server, and their ratio to those of the same server without drafts.

    ``where``: a model's folder, served afresh for each run (the cache begins empty) with ``draft_tokens`` and
    then without; or a running server, taken as it is. Every round has other prompts and arrivals, the same
    for both.
    """
    ours = f"mtp {draft_tokens}" if draft_tokens else OFF
    names = ["server"] if isinstance(where, Target) else list(dict.fromkeys((ours, OFF)))
    runs: dict[str, list[list[Outcome]]] = {name: [] for name in names}
    schedules = [load.schedule(number) for number in range(rounds)]
    with Progress("bench serve", sum(len(times) for _, times in schedules) * len(names), "requests") as bar:
        for number, (bodies, times) in enumerate(schedules):
            for name in names:
                bar.note(f"round {number + 1}, {name}")
                with _target(where, 0 if name == OFF else draft_tokens) as target:
                    _warm_up(target, load)
                    runs[name].append(run(target, bodies, times, lambda outcome: bar.advance(1)))
    figures = {name: summary(*found) for name, found in runs.items()}
    own = figures.pop(names[0])
    result: dict[str, Any] = {"ratios": {}, "ours": {"name": names[0], **own}, "peers": figures}
    for peer, theirs in figures.items():
        ratios = {"tokens_per_second": _ratio(own["tokens_per_second"], theirs["tokens_per_second"])}
        ratios |= {f"{name}_p50": _ratio(own[name]["p50"], theirs[name]["p50"]) for name in TIMES}
        result["ratios"] |= {f"{peer}:{name}": ratio for name, ratio in ratios.items()}
        pairs = [pair for a, b in zip(runs[names[0]], runs[peer]) for pair in zip(a, b)]
        whole = [(a.text, b.text) for a, b in pairs if not a.error and not b.error]
        result["same_answers"] = {"of": len(whole), "same": sum(a == b for a, b in whole)}
    result["load"] = {name: value for name, value in vars(load).items() if name != "text"}
    result["load"]["rounds"] = rounds
    result["machine"] = machine()
    result["latencies"] = {name: _latencies(found) for name, found in runs.items()}
    return result


@contextmanager
def _target(where: Path | Target, draft_tokens: int) -> Iterator[Target]:
    if isinstance(where, Target):
        yield where
    else:
        with Server(where, ["--draft-tokens", str(draft_tokens)]) as server:
            yield server.target


def _warm_up(target: Target, load: Load) -> None:
    """Two requests whose prompts no other begins with; the first of a process is slow."""
    bodies = [
        {"prompt": f"{number}{load.text[-load.prompt_length :]}", "max_tokens": 8, "temperature": 0}
        for number in range(2)
    ]
    for outcome in run(target, bodies, [0.0, 0.0]):
        if outcome.error:
            raise Failure(f"the server does not answer a first request: {outcome.error}")


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def _latencies(runs: Sequence[Sequence[Outcome]]) -> dict[str, list[float]]:
    good = [one for found in runs for one in found if not one.error]
    times = (
        [one.pieces[0] for one in good if one.pieces], per_token(good), between_pieces(good),
        [one.end for one in good],
    )  # fmt: skip
    return {name: [round(value, 5) for value in sorted(values)] for name, values in zip(TIMES, times)}


def report(result: dict[str, Any]) -> str:
    """The result as a small table."""
    load = result["load"]
    rows = {result["ours"]["name"]: result["ours"], **result["peers"]}
    lines = [
        f"{load['rate']:g} requests/s, prompts of {load['prompt_length']} characters,"
        f" {load['prefix_share']:.0%} of them shared, answers of up to {load['max_tokens']} tokens,"
        f" {load['rounds']} rounds",
        "",
        f"{'':<26}" + "".join(f"{name:>24}" for name in rows),
    ]

    def row(title: str, texts: list[str]) -> None:
        lines.append(f"{title:<26}" + "".join(f"{text:>24}" for text in texts))

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def times(values: dict[str, float | None]) -> str:
        return " ".join("-" if value is None else f"{1000 * value:.4g}" for value in values.values())

    found = list(rows.values())
    row("answered, of", [f"{one['answered']} of {one['requests']}" for one in found])
    row("tokens/s", [f"{one['tokens_per_second']:.1f}" for one in found])
    row("requests/s", [f"{one['requests_per_second']:.2f}" for one in found])
    row("prompt found in cache", [share(one["cache_hit_rate"]) for one in found])
    row("drafts accepted", [share(one["acceptance_rate"]) for one in found])
    lines += ["", "milliseconds at p50 p95 p99"]
    for name in TIMES:
        row("  " + name.replace("_", " "), [times(one[name]) for one in found])
    for name, one in rows.items():
        lines += [f"{name}: {count} x {error}" for error, count in one["errors"].items()]
    if result["ratios"]:
        lines += ["", "ratios (ours / theirs):"]
        lines += [f"  {name:<36} {'-' if x is None else f'{x:.2f}'}" for name, x in result["ratios"].items()]
        same = result["same_answers"]
        lines.append(f"answers that are the same: {same['same']} of {same['of']}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """The latencies' distributions: which share of them is at most so long."""
    from matplotlib.figure import Figure  # drawn without pyplot: no global state, no window system

    figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=130)
    shown = ("time_to_first_token", "time_per_token", "end_to_end")
    for axis, name in zip(figure.subplots(1, len(shown)), shown):
        for label, times in result["latencies"].items():
            values = [1000 * value for value in times[name]]
            axis.ecdf(values, label=label, linewidth=1.4)
        axis.set(title=name.replace("_", " "), xlabel="milliseconds", ylim=(0, 1))
        axis.grid(True, color="0.9", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of the answers")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)
