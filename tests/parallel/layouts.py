"""The table of layouts that must train as one process does, and the run of one of them.

Short form in every test run, whole by ``pytest -m slow tests/parallel/test_layouts.py`` (also as a table:
``python -m tests.parallel.layouts``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.parallel.ranks import run_ranks
from tests.train.conftest import MODEL


@dataclass(frozen=True)
class Case:
    """``parallel`` on ``world`` processes, with ``changes`` of the recipe (which the one process has too)."""

    world: int
    parallel: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    short: bool = False  # also in the short form


FP8 = {"precision": "fp8"}
DOCUMENTS = {"data": {"mask_documents": True}}
LAYOUTS: dict[str, Case] = {
    "data 2": Case(2, {}, short=True),
    "copies 2": Case(2, {"data_replicate": 2}, short=True),
    "data 2, zero 3": Case(2, {"zero": 3}),
    "expert 2": Case(2, {"expert": 2}, short=True),
    "expert 2, zero 3": Case(2, {"expert": 2, "zero": 3}, short=True),
    "expert 2, one micro batch": Case(2, {"expert": 2}, {"batch": {"micro_sequences": 16}}),
    "expert 2, recompute layer": Case(2, {"expert": 2}, {"recompute": "layer"}),
    "expert 2, recompute report, zero 3": Case(2, {"expert": 2, "zero": 3}, {"recompute": "report"}),
    "expert 2, documents masked": Case(2, {"expert": 2}, DOCUMENTS),
    "expert 2, FP8": Case(2, {"expert": 2}, FP8, short=True),
    "data 2, zero 3, FP8": Case(2, {"zero": 3}, FP8),
    "expert 2, MTP off": Case(2, {"expert": 2}, {"mtp": {"weight": 0.0}}),
    "pipeline 2, 1F1B": Case(2, {"pipeline": 2, "schedule": "1f1b"}),
    "pipeline 2, interleaved": Case(2, {"pipeline": 2, "schedule": "interleaved"}),
    "pipeline 2, ZBV": Case(2, {"pipeline": 2, "schedule": "zbv"}),
    "pipeline 2, DualPipeV": Case(2, {"pipeline": 2}, short=True),
    "pipeline 2, DualPipeV, FP8": Case(2, {"pipeline": 2}, FP8),
    "pipeline 2, documents masked": Case(2, {"pipeline": 2}, DOCUMENTS),
    "data 4": Case(4, {}),
    "copies 2, shard 2": Case(4, {"data_replicate": 2}),
    "copies 2, shard 2, zero 3": Case(4, {"data_replicate": 2, "zero": 3}),
    "expert 4": Case(4, {"expert": 4}),
    "shard 4, expert 2": Case(4, {"expert": 2}),
    "shard 4, expert 2, zero 3": Case(4, {"expert": 2, "zero": 3}),
    "copies 2, expert 2": Case(4, {"data_replicate": 2, "expert": 2}),
    "pipeline 2, data 2": Case(4, {"pipeline": 2, "schedule": "zbv"}),
    "pipeline 2, expert 2": Case(4, {"pipeline": 2, "expert": 2}),
    "pipeline 2, expert 2, FP8": Case(4, {"pipeline": 2, "expert": 2}, FP8),
    "pipeline 4, 1F1B": Case(4, {"pipeline": 4, "schedule": "1f1b"}),
    "pipeline 2, shard 4, expert 2": Case(8, {"pipeline": 2, "expert": 2}, {"batch": {"micro_sequences": 4}}),
    "context 2": Case(2, {"context": 2}, short=True),
    "context 2, documents masked": Case(2, {"context": 2}, DOCUMENTS),
    "context 2, recompute report": Case(2, {"context": 2}, {"recompute": "report"}),
    "context 2, expert 2, zero 3": Case(2, {"context": 2, "expert": 2, "zero": 3}),
    "context 2, FP8": Case(2, {"context": 2}, FP8),
    "context 4": Case(4, {"context": 4}),
    "shard 4, context 2, expert 4": Case(4, {"context": 2, "expert": 4}),
    "pipeline 2, context 2, documents masked": Case(4, {"pipeline": 2, "context": 2}, DOCUMENTS),
    "copies 2, shard 4, expert 2, zero 3": Case(
        8, {"data_replicate": 2, "expert": 2, "zero": 3}, {"batch": {"micro_sequences": 8}}
    ),
}


def tree(data: str, out: str, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run of ``steps`` steps: MTP, balance loss, accumulation, an average of the weights."""
    base: dict[str, Any] = {
        "model": {**MODEL, "num_hidden_layers": 4}, "data": {"path": data}, "sequence_length": 32,
        "device": "cpu", "total_tokens": steps * 16 * 32, "batch": {"sequences": 16, "micro_sequences": 4},
        "optimizer": {"lr": 2e-3}, "checkpoint": {"every": 1000, "keep": 3}, "ema": {"decay": 0.9},
        "validation": {"every": 1000, "sequences": 4}, "samples": {"prompts": []}, "out": out,
    }  # fmt: skip
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base


def train(runs: list[dict[str, Any]]) -> None:
    """In a rank, or in one process: every run of a list of recipes."""
    from dsv3.config import recipe as recipes
    from dsv3.config.train import PretrainRecipe
    from dsv3.train.pretrain import pretrain

    for run in runs:
        pretrain(recipes.validate(PretrainRecipe, run))


def reference_key(case: Case) -> str:
    """Cases with the same recipe but for the layout share a run of one process."""
    return json.dumps(case.changes, sort_keys=True)


def run_all(cases: dict[str, Case], data: Path, out: Path, steps: int) -> dict[str, tuple[Path, Path]]:
    """Run every case and the runs of one process: (folder, folder of the one process) by name."""
    names = list(cases)
    ones = {reference_key(case): f"one-{n}" for n, case in enumerate(cases.values())}
    changes = {ones[reference_key(case)]: case.changes for case in cases.values()}
    run_ranks(
        0,
        "tests.parallel.layouts:train",
        [tree(str(data), str(out / name), steps, change) for name, change in changes.items()],
        timeout=900,
    )
    for world in sorted({case.world for case in cases.values()}):
        runs = [
            tree(
                str(data),
                str(out / f"case-{names.index(name)}"),
                steps,
                {**case.changes, "parallel": case.parallel},
            )
            for name, case in cases.items()
            if case.world == world
        ]
        run_ranks(world, "tests.parallel.layouts:train", runs, timeout=1800)
    return {
        name: (out / f"case-{names.index(name)}", out / ones[reference_key(case)])
        for name, case in cases.items()
    }


def differences(case: Path, one: Path) -> dict[str, float]:
    """How far a run is from the one process's: losses, held-out text, gradient norms, biases, tensors."""
    from dsv3.checkpoint.weights import Weights
    from dsv3.train.run import read_lines

    ours, theirs = (
        [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line] for folder in (case, one)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    found = {
        key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs))
        for key in ("loss", "grad_norm")
    }
    found["mtp_loss"] = max(
        (abs(x - y) / y for a, b in zip(ours, theirs) for x, y in zip(a["mtp_loss"], b["mtp_loss"])),
        default=0.0,
    )
    held_out = [
        [
            line["validation_loss"]
            for line in read_lines(folder / "metrics.jsonl")
            if "validation_loss" in line
        ]
        for folder in (case, one)
    ]
    found["validation_loss"] = max(abs(a - b) / b for a, b in zip(*held_out, strict=True))
    moved = total = 0
    for a, b in zip(ours, theirs):
        assert a["expert_load"].keys() == b["expert_load"].keys()
        for layer, load in b["expert_load"].items():
            assert sum(a["expert_load"][layer]) == sum(load)
            moved += sum(abs(x - y) for x, y in zip(a["expert_load"][layer], load)) // 2
            total += sum(load)
    found["rerouted"] = moved / total
    for name in ("model", "model-ema"):
        with Weights(case / name) as own, Weights(one / name) as wanted:
            assert own.entries.keys() == wanted.entries.keys()
            errors = {"bias": 0.0, "tensor": 0.0}
            for entry in wanted.entries:
                x, y = (held.file_of(entry).read(entry).float() for held in (own, wanted))
                assert x.shape == y.shape
                if entry.endswith("e_score_correction_bias"):
                    errors["bias"] = max(errors["bias"], float((x - y).abs().max()))
                else:
                    errors["tensor"] = max(errors["tensor"], float((x - y).norm() / y.norm()))
            found.update({f"{name} {kind}": error for kind, error in errors.items()})
    return found


def main() -> None:
    """Run the whole table and print it."""
    import sys
    import tempfile

    from tests.train.conftest import prepare_words

    names = sys.argv[1:] or list(LAYOUTS)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_words(Path(folder))
        found = run_all({name: LAYOUTS[name] for name in names}, data, Path(folder) / "runs", steps=20)
        for name, (case, one) in found.items():
            shown = "  ".join(f"{key} {value:.1e}" for key, value in differences(case, one).items())
            print(f"{LAYOUTS[name].world} x  {name:40} {shown}")


if __name__ == "__main__":
    main()
