"""The claims' training runs: who shares which, what is read from them, and what each verdict rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.bench import paired
from dsv3.bench.claims import balance, fp8, late, mtp, nodes, training
from dsv3.bench.claims.claim import CONTRARY, HOLDS, OPEN, Options
from dsv3.bench.claims.routes import Routes
from dsv3.bench.paired import Run
from dsv3.config import recipe as recipes
from dsv3.config.train import PretrainRecipe
from tests.train.conftest import MODEL, prepare_words

Made = dict[str, tuple[float, float]]  # variation: held-out bits per byte, MaxVio


def write_run(folder: Path, bits: float, violation: float, steps: int) -> None:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {
            "step": step, "loss": 9 - step / steps,
            "max_violation": {"1": violation, "2": violation + 2, "9": 1e6},  # 9: the MTP module's layer
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    lines.append({"step": steps, "validation_loss": 1.0, "validation_bits_per_byte": bits})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(training, "prepared", lambda: tmp_path)
    monkeypatch.setattr(paired, "check", lambda data: None)
    return Options(True, (0, 1, 2), 1, tmp_path)


def pretend(monkeypatch: pytest.MonkeyPatch, made: Made) -> list[str]:
    """Instead of training, write runs whose bits per byte grow with the seed alike for all."""
    trained: list[str] = []

    def train(runs: list[Run], steps: int, *_: Any) -> None:
        for run in runs:
            trained.append(f"{run.name}-{run.seed}")
            bits, violation = made[run.name]
            write_run(run.folder, bits * (1 + run.seed + 1e-3 * (run.seed - 1)), violation, steps)
            (run.folder / "model").mkdir()
            (run.folder / "checkpoints").mkdir()

    monkeypatch.setattr(paired, "train", train)
    return trained


def test_the_baseline_is_trained_once_for_all(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    trained = pretend(monkeypatch, {name: (1.0, 0.5) for name in training.VARIATIONS})
    runs = training.trained((training.BASE, "gamma-kept"), options)
    assert trained == [f"{name}-{seed}" for seed in range(3) for name in (training.BASE, "gamma-kept")]
    assert not any((run.folder / "checkpoints").exists() for run in runs)
    del trained[:]
    training.trained((training.BASE, training.LONGER), options)
    assert trained == [f"{training.LONGER}-{seed}" for seed in range(3)]


def test_equal_flops_are_more_steps(options: Options) -> None:
    for scale in (training.FAST, training.FULL):
        assert training.steps_of(training.BASE, scale) == training.steps_of("no-mtp", scale) == scale.steps
        assert 1.2 < training.steps_of(training.LONGER, scale) / scale.steps < 2


@pytest.mark.parametrize("scale", [training.FAST, training.FULL])
def test_a_variation_changes_what_it_says(scale: training.Scale) -> None:
    def read(name: str) -> PretrainRecipe:
        run = Run(name, 3, Path("out"), (*scale.words(), *training.VARIATIONS[name][1]))
        words = paired.command(run, scale.steps, "data")
        return recipes.load(PretrainRecipe, paired.RECIPE, words[5:-2])

    base = read(training.BASE)
    assert base.model == scale.config() and base.seed == 3 and base.validation.sequences == 192
    assert base.balance.gamma == 0.01 and base.model.aux_loss_alpha == 1e-4 and base.model.topk_group == 2
    for name in training.VARIATIONS:
        found, changed = read(name), set()
        for key in PretrainRecipe.model_fields:
            ours, theirs = getattr(found, key), getattr(base, key)
            if ours != theirs:
                fields = type(ours).model_fields
                changed |= {
                    f"{key}.{field}" for field in fields if getattr(ours, field) != getattr(theirs, field)
                }
        wanted = {word.removeprefix("--") for word in training.VARIATIONS[name][1] if word.startswith("--")}
        assert changed == wanted, name
    assert not read("batch-aux-1e-2").model.seq_aux
    assert [piece.to for piece in read("gamma-kept").schedule.gamma] == [1]


def test_balance_takes_the_best_alpha(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    made = {
        "baseline": (1.0, 0.1),
        "unbalanced": (1.0, 7.0),
        "aux-1e-3": (1.05, 3.0),
        "aux-1e-2": (1.02, 1.0),
    }
    pretend(monkeypatch, {**made, "aux-1e-1": (1.1, 0.2)})
    found = balance.measure_balance(options)
    assert found.verdict == HOLDS and "1e-2" in found.figure and "+2.00 ± 0.00 %" in found.figure
    assert "MaxVio 2.00 against 1.10, 8.00" in found.figure  # mean of two layers, the module's left out
    balance.draw_balance(found.data, options.out / "plot.png")
    pretend(monkeypatch, {**made, "aux-1e-1": (0.9, 0.2)})
    other = Options(True, (0, 1, 2), 1, options.out / "other")
    assert balance.measure_balance(other).verdict == CONTRARY


def test_batch_compares_losses_and_loads(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    pretend(monkeypatch, {"baseline": (1.0, 0.1), "aux-1e-2": (1.01, 0.2), "batch-aux-1e-2": (1.0, 0.3)})

    def read(folder: Path, *_: Any) -> Routes:
        apart = {"baseline": 0.3, "aux-1e-2": 0.2, "batch-aux-1e-2": 0.4}[folder.parent.name]
        return Routes({"a": [[0.5 + apart, 0.5 - apart]], "b": [[0.5, 0.5]]}, [1])

    monkeypatch.setattr(balance, "routes", read)
    found = balance.measure_batch(options)
    assert "by sequence +1.00 ± 0.00 % bits per byte above by batch" in found.figure
    assert "loads 0.20 by sequence, +0.20 ± 0.00 more by batch, +0.10 ± 0.00 more with" in found.figure
    assert found.verdict == f"loss: {HOLDS}; specialisation: {HOLDS}"
    balance.draw_batch(found.data, options.out / "plot.png")


def test_mtp_late_and_nodes(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    made = {"baseline": (1.0, 0.1), "no-mtp": (1.02, 0.1), "no-mtp-longer": (0.99, 0.1)}
    pretend(
        monkeypatch, {**made, "gamma-kept": (1.0, 0.4), "lambda-kept": (0.9, 0.1), "any-node": (0.998, 0.1)}
    )
    found = mtp.measure(options)
    assert found.verdict == f"equal tokens: {HOLDS}; equal FLOPs: {CONTRARY}"
    mtp.draw(found.data, options.out / "mtp.png")
    found = late.measure(options)
    assert found.verdict == f"gamma: {HOLDS}; lambda: {CONTRARY}"
    assert "MaxVio of the last steps 1.10 against 1.40" in found.figure
    late.draw(found.data, options.out / "late.png")

    visits = {"baseline": [4, 6, 0, 0], "any-node": [0, 5, 5, 0]}
    monkeypatch.setattr(nodes, "routes", lambda folder, *_: Routes({}, visits[folder.parent.name]))
    found = nodes.measure(options)
    assert found.verdict == f"limit: {HOLDS}; loss: {HOLDS}"
    assert "visits 1.60 groups instead of 2.50" in found.figure
    nodes.draw(found.data, options.out / "nodes.png")
    visits["baseline"] = [4, 5, 1, 0]
    assert nodes.measure(options).verdict.startswith(f"limit: {CONTRARY}")


def test_released_bytes_between_nodes() -> None:
    row = 7168 + 4 * 56 + 2 * 7168  # FP8 with scales there, BF16 back
    assert nodes.released_bytes(True) == pytest.approx(7 * 0.5 * row)  # 4 of 8 nodes, one's own not counted
    assert nodes.released_bytes(False) == pytest.approx(7 * (1 - (7 / 8) ** 8) * row)


def test_fp8_uses_every_whole_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    monkeypatch.setattr(fp8, "FOLDER", tmp_path / "fp8")
    monkeypatch.setattr(fp8, "STEPS", 40)
    for seed in (0, 1, 4):
        write_run(tmp_path / "fp8" / f"seed-{seed}" / "fp32", 2.0, 0.1, 40)
        write_run(
            tmp_path / "fp8" / f"seed-{seed}" / "fp8", 2.0 * (1 + 1e-3 * seed), 0.1, 40 if seed < 4 else 39
        )
    calls = pretend(monkeypatch, {})
    found = fp8.measure_gap(Options(True, (0, 1), 1, tmp_path))  # seed 4 is not whole
    assert not calls and found.data["held-out text"] == pytest.approx([0.0, 0.1])
    assert found.data["loss at the end"] == pytest.approx([0.0, 0.0]) and found.verdict == HOLDS
    fp8.draw(found.data, tmp_path / "plot.png")
    assert np.isclose(len(found.rows), 3) and found.verdict != OPEN


@pytest.mark.slow
def test_a_real_claim_of_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare_words(tmp_path)
    scale = training.Scale("fast", 2, {**MODEL, "max_position_embeddings": 256, "initializer_range": 0.05})
    monkeypatch.setattr(training, "FAST", scale)
    for module in (training, nodes):
        monkeypatch.setattr(module, "prepared", lambda: data)
    found = nodes.measure(Options(True, (5,), 2, tmp_path))
    assert found.verdict == f"limit: {HOLDS}; loss: {OPEN}"  # one seed resolves nothing
    assert {name: row["steps"] for name, row in found.data["variations"].items()} == {
        "baseline": 2,
        "any-node": 2,
    }
    visits = found.data["variations"]["baseline"]["nodes"]
    assert sum(visits[:2]) > 0 and not sum(visits[2:])
