"""Pictures of a GRPO run, drawn from ``metrics.jsonl``: reward and held-out accuracy, and what to watch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3.train.callbacks.plots import blank
from dsv3.train.run import read_lines

# What a panel shows: metrics.jsonl's key, the axis.
WATCHED = {
    "completions/mean_length": "tokens an answer",
    "entropy": "entropy (nats a token)",
    "kl": "KL to the reference (k3, nats a token)",
    "clip_ratio/region_mean": "share clipped",
    "frac_reward_zero_std": "share of groups without signal",
    "sampling/sampling_logp_difference/mean": "|log p training - sampling|",
}


def _column(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have the key."""
    kept = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def draw_reward(lines: list[dict[str, Any]], path: Path) -> None:
    """Reward with its spread and each function's mean; held-out accuracy by task."""
    tasks = sorted({key for line in lines for key in line if key.startswith("accuracy/")})
    panels = 2 if tasks else 1  # prompts of one's own have no held-out examples
    figure, axes = blank(1, panels, 5 * panels, 3.8)
    left = axes[0, 0]
    steps, reward = _column(lines, "reward")
    _, spread = _column([line for line in lines if line.get("reward") is not None], "reward_std")
    left.plot(steps, reward, color="C0", label="reward")
    low = [mean - std for mean, std in zip(reward, spread)]
    high = [mean + std for mean, std in zip(reward, spread)]
    left.fill_between(steps, low, high, color="C0", alpha=0.12, linewidth=0, label="± deviation")
    names = sorted(
        {key for line in lines for key in line if key.startswith("rewards/") and key.endswith("/mean")}
    )
    for number, key in enumerate(names if len(names) > 1 else [], start=1):
        left.plot(*_column(lines, key), f"C{number}", linewidth=1, label=key.split("/")[1])
    left.set(xlabel="steps", ylabel="reward of the rollouts")
    left.legend(frameon=False, fontsize=8)
    left.xaxis.get_major_locator().set_params(integer=True)
    if tasks:
        right = axes[0, 1]
        for key in tasks:
            steps, values = _column(lines, key)
            right.plot(steps, [100 * value for value in values], marker="o", ms=3, label=key.split("/")[1])
        right.set(xlabel="steps", ylabel="held-out accuracy (%)", ylim=(0, 100))
        right.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def draw_watched(lines: list[dict[str, Any]], path: Path) -> None:
    """The quantities that tell of a run going wrong, a panel each."""
    found = {key: name for key, name in WATCHED.items() if _column(lines, key)[0]}
    columns = 3
    rows = -(-len(found) // columns)
    figure, axes = blank(rows, columns, 11, 2.6 * rows)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (key, name) in zip(axes.flat, found.items()):
        axis.plot(*_column(lines, key), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("steps")
        axis.set_ylim(bottom=0)
    figure.savefig(path)


def draw(run: Path) -> list[Path]:
    """``reward.png`` and ``policy.png`` of a run folder, in ``plots/``."""
    source = run / "metrics.jsonl"
    lines = read_lines(source) if source.exists() else []
    if not any(line.get("reward") is not None for line in lines):
        return []
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    paths = [folder / "reward.png", folder / "policy.png"]
    draw_reward(lines, paths[0])
    draw_watched(lines, paths[1])
    return paths
