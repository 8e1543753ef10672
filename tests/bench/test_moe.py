"""What ranks report of trips and steps becomes tables whose figures can be checked by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv3.bench.moe import bench, cases_of, measured, report
from dsv3.cli import bench as verbs
from dsv3.common.errors import UserError
from tests.parallel.ranks import run_ranks
from tests.train.conftest import MODEL


def reported(seconds: list[float], **more: object) -> dict:
    return {"seconds": seconds, "waited": [0.1 * s for s in seconds], "layers": 5, **more}


def test_tables_from_reports() -> None:
    trip = {"seconds": 0.004, "sorting": 0.001, "bytes": 1_000_000}
    trips = {"rate": 1e9, "fp32": trip, "bf16": trip, "fp8": {**trip, "bytes": 400_000}}
    slower = {**trips, "rate": 5e8, "fp32": {**trip, "seconds": 0.008}}
    first = {"alone": [1.2, 3.0], "fp8": [1.0], "expert 2": [0.6]}
    second = {"alone": [1.1, 3.0], "fp8": [1.3], "expert 2": [0.5]}
    ran = {
        1: [{"alone": reported([2.0, 1.0])}],
        2: [
            {name: reported(times) for name, times in first.items()},
            {name: reported(times) for name, times in second.items()},
        ],
    }
    ran[2][0]["fp32"] = reported([1.5, 4.0], trips=trips)
    ran[2][1]["fp32"] = reported([1.6, 1.2], trips=slower)
    found = measured(ran, tokens=1000)
    fp32, bf16, fp8 = found["ours"]["travel"]
    # 5 layers of the slowest rank; the slowest link
    assert fp32["seconds"] == pytest.approx(0.04) and fp32["floor_seconds"] == pytest.approx(0.01)
    assert fp32["over_floor"] == found["ratios"]["floor:2 processes, fp32"] == pytest.approx(4)
    assert fp32["share"] == pytest.approx(0.04 / 1.6) and fp32["waiting_share"] == pytest.approx(0.1)
    assert fp8["bytes"] == 2_000_000 and fp8["share"] == pytest.approx(0.02 / 1.3) and "share" not in bf16
    one, two = found["ours"]["weak"]
    assert one["tokens_per_second"] == one["silent_tokens_per_second"] == 1000
    assert two["tokens_per_second"] == pytest.approx(2000 / 1.6)
    assert two["silent_tokens_per_second"] == pytest.approx(2000 / 1.2)
    assert found["ratios"]["one process:expert 2"] == 0.6
    assert "expert 2" in report({**found, "picture": "p"})


def test_wrong_numbers_are_refused_before_anything_runs() -> None:
    for words, why in ((["--ranks", "3"], r"--ranks \(3\)"), (["--sequences", "6"], "multiple of 8")):
        with pytest.raises(UserError, match=why):
            CliRunner().invoke(verbs.app, ["moe", *words], catch_exceptions=False, standalone_mode=False)


def trips_of(_: None) -> dict:
    """In a rank: the trips of a layer of known routing."""
    import torch
    import torch.distributed as dist

    from dsv3.bench.moe_worker import recipe_of, trips
    from dsv3.parallel.world import enter
    from dsv3.train.stage import make_model

    os.environ["LOCAL_WORLD_SIZE"] = "1"
    job = {"model": MODEL, "length": 16}
    recipe = recipe_of(job, {**cases_of(2, 8)["fp32"]})
    world = enter(recipe.parallel, recipe.model, torch.device("cpu"))
    model = make_model(recipe, torch.device("cpu"))
    _, traffic = world.spread(model)
    moe = model.moe_layers()[1]
    gate = moe.gate.e_score_correction_bias
    gate[:] = -100
    gate[:2] = 100  # every token goes to both experts 0 and 1, which rank 0 has
    found = trips(moe, 32, 10)
    assert dist.get_world_size() == 2 and traffic
    return found


@pytest.mark.slow
def test_bytes_of_a_known_routing() -> None:
    """Of 10 tokens with 2 experts on rank 0, rank 1 sends 20 rows of 32 numbers, there and back, twice."""
    here, there = run_ranks(2, "tests.bench.test_moe:trips_of")
    for name, row in (("fp32", 2 * 128), ("bf16", 2 * 64), ("fp8", 32 + 4 + 64)):
        assert here[name]["bytes"] == 0
        assert there[name]["bytes"] == 2 * 20 * row
        assert there[name]["seconds"] > 0 and there[name]["sorting"] > 0
    assert here["rate"] > 1e6


@pytest.mark.slow
def test_a_real_run(tmp_path: Path) -> None:
    found = bench([1, 2], 8, 16, 1, tmp_path, model={**MODEL, "num_hidden_layers": 4})
    assert set(found["ratios"]) >= {"floor:2 processes, fp8", "silent:2 processes", "one process:pipeline 2"}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    json.dumps(found)
    assert (tmp_path / "moe.png").read_bytes().startswith(b"\x89PNG")
