"""The training runs behind the claims, shared by all of them, and what is read from their lines.

A variation is the baseline with a few keys changed; every claim that needs it finds the same run, in
``OUT/training/SCALE/seed-N/NAME``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3.bench import paired
from dsv3.bench.claims.claim import Options
from dsv3.bench.claims.text import prepared
from dsv3.bench.paired import Run
from dsv3.config.model import ModelConfig
from dsv3.plan.params import counts, train_flops_per_token

VOCABULARY = 2048  # of recipes/data-claims.yaml
FAST_MODEL: dict[str, int] = {
    "hidden_size": 128, "num_hidden_layers": 4, "n_routed_experts": 16, "moe_intermediate_size": 96,
    "intermediate_size": 384, "q_lora_rank": 64, "num_attention_heads": 2, "vocab_size": VOCABULARY,
}  # fmt: skip
FULL_MODEL: dict[str, int] = {"vocab_size": VOCABULARY}


@dataclass(frozen=True)
class Scale:
    """How large the runs are: steps of 8 x 128 tokens, and what changes the tiny preset."""

    name: str
    steps: int
    model: dict[str, int]

    def config(self) -> ModelConfig:
        """The baseline's model."""
        return ModelConfig.preset("tiny", **self.model)

    def words(self) -> tuple[str, ...]:
        """The baseline's keys beside those of :func:`dsv3.bench.paired.command`."""
        model = (word for key, value in self.model.items() for word in (f"--model.{key}", str(value)))
        return (*model, "--validation.every", "1000000", "--validation.sequences", "192")


FAST, FULL = Scale("fast", 300, FAST_MODEL), Scale("full", 2000, FULL_MODEL)

BASE = "baseline"
NO_BIAS = ("--balance.gamma", "0")
KEPT = "[{until: 1, to: 1}]"
NO_MTP = ("--model.num_nextn_predict_layers", "0")
LONGER = "no-mtp-longer"  # for as many FLOPs as the baseline

# Name, what it is, and its keys.
VARIATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    BASE: ("biases, gamma 0.01, and alpha 1e-4 by sequence: the recipe", ()),
    "unbalanced": ("nothing balances", (*NO_BIAS, "--model.aux_loss_alpha", "0")),
    "aux-1e-3": ("auxiliary loss by sequence, alpha 1e-3", (*NO_BIAS, "--model.aux_loss_alpha", "1e-3")),
    "aux-1e-2": ("auxiliary loss by sequence, alpha 1e-2", (*NO_BIAS, "--model.aux_loss_alpha", "1e-2")),
    "aux-1e-1": ("auxiliary loss by sequence, alpha 1e-1", (*NO_BIAS, "--model.aux_loss_alpha", "1e-1")),
    "batch-aux-1e-2": (
        "auxiliary loss by batch, alpha 1e-2",
        (*NO_BIAS, "--model.aux_loss_alpha", "1e-2", "--model.seq_aux", "false"),
    ),
    "no-mtp": ("no MTP, as many tokens", NO_MTP),
    LONGER: ("no MTP, as many FLOPs", NO_MTP),
    "gamma-kept": ("gamma stays to the end", ("--schedule.gamma", KEPT)),
    "lambda-kept": ("lambda stays to the end", ("--schedule.mtp", KEPT)),
    "any-node": ("experts of all groups", ("--model.topk_group", "4")),
}


def scale_of(options: Options) -> Scale:
    """The scale that the options ask for."""
    return FAST if options.fast else FULL


def steps_of(name: str, scale: Scale) -> int:
    """Steps of a variation: the scale's, but for the one that is given the baseline's FLOPs."""
    if name != LONGER:
        return scale.steps
    config, length = scale.config(), paired.LENGTH
    ratio = train_flops_per_token(config, length) / train_flops_per_token(config, length, mtp=False)
    return round(scale.steps * ratio)


def trained(names: Sequence[str], options: Options) -> list[Run]:
    """The runs of these variations from every seed, brought to their end where they are not."""
    scale = scale_of(options)
    data = str(prepared())
    variations = {name: (*scale.words(), *VARIATIONS[name][1]) for name in names}
    runs = paired.runs_of(variations, options.seeds, options.out / "training" / scale.name)
    paired.check(data)
    for steps in dict.fromkeys(steps_of(name, scale) for name in names):
        waiting = [run for run in runs if steps_of(run.name, scale) == steps and not finished(run)]
        if waiting:
            paired.train(waiting, steps, data, options.workers, "claims")
    for run in runs:  # what is read from a run is its lines and its model
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    return runs


def finished(run: Run) -> bool:
    """Whether a run has come to its end."""
    return (run.folder / "model").is_dir()


def gathered(runs: Sequence[Run], options: Options) -> dict[str, dict[str, Any]]:
    """What the lines of each variation's runs say, a value a seed; ``violation_series``: bins of 10 steps.

    MaxVio is the main model's: mean over its layers with experts, of the last quarter of the steps.
    """
    layers = scale_of(options).config().num_hidden_layers
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        lines = paired.steps_of(run)
        violation = np.array([_violation(line, layers) for line in lines])
        row = found.setdefault(run.name, {"what": VARIATIONS[run.name][0], "steps": len(lines), "seeds": []})
        row["seeds"].append(run.seed)
        values = {
            "bits_per_byte": paired.held_out(run),
            "max_violation": float(violation[-max(1, len(violation) // 4) :].mean()),
            "max_violation_last": float(violation[-max(1, len(violation) // 30) :].mean()),
            "violation_series": violation[: len(violation) // 10 * 10].reshape(-1, 10).mean(axis=1).tolist(),
        }
        for key, value in values.items():
            row.setdefault(key, []).append(value)
    return found


def _violation(line: dict[str, Any], layers: int) -> float:
    return float(np.mean([value for layer, value in line["max_violation"].items() if int(layer) < layers]))


def changes(found: dict[str, dict[str, Any]], name: str, reference: str) -> list[float]:
    """Held-out bits per byte of a variation above the reference's from the same seed, in percent."""
    pairs = zip(found[name]["bits_per_byte"], found[reference]["bits_per_byte"])
    return [100 * (ours / theirs - 1) for ours, theirs in pairs]


def size(options: Options) -> str:
    """How large the runs are, in words."""
    scale, length = scale_of(options), paired.SEQUENCES * paired.LENGTH
    config = scale.config()
    return (
        f"{counts(config).main / 1e6:.1f}M parameters (and an MTP module), {config.num_experts_per_tok} of"
        f" {config.n_routed_experts} experts in {config.num_hidden_layers - config.first_k_dense_replace}"
        f" layers, {scale.steps:,} steps of {length:,} tokens, seeds {', '.join(map(str, options.seeds))}"
    )
