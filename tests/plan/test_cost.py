"""The cost model: the report's own run, runs held out, and each term against a count of its own."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import pytest

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.plan import alltoall, cost
from dsv3.plan.cost import Assumptions, Layout, Run, calibrate, estimate, report_run
from dsv3.plan.hardware import HARDWARE, hardware
from dsv3.plan.params import counts, train_flops_by_part, train_flops_per_token
from dsv3.plan.pipeline import Times
from tests.model.build import tiny_config


@pytest.fixture(scope="module")
def efficiency() -> float:
    return calibrate()


def test_the_reports_run(efficiency: float) -> None:
    """Issue: 180K hours a trillion tokens, 3.7 days, 2.664M + 119K + 5K hours, $5.576M, each within 5 %."""
    rows = {str(row["figure"]): row for row in cost.report_table(efficiency)}
    assert [row["published"] for row in rows.values()] == [
        180_000, 3.7, 2_664_000, 119_000, 5_000, 2_788_000, 5_576_000,
    ]  # fmt: skip
    assert all(abs(float(row["error"])) < 0.05 for row in rows.values())
    assert rows["context extension, H800 hours"]["kind"] == "predicted"
    assert 0.25 < efficiency < 0.45


def test_runs_held_out(efficiency: float) -> None:
    """Megatron-Bridge's rows: what the docs say of the errors, so that they cannot change unseen."""
    errors = {row["run"]: float(row["error"]) for row in cost.held_out_table(efficiency)}
    assert abs(errors["1024 h100, FP8 (25.09)"]) < 0.05
    assert all(abs(error) < 0.15 for run, error in errors.items() if "gb200" in str(run))
    assert all(0.4 < error < 0.9 for run, error in errors.items() if " b200" in str(run))  # too hopeful


def test_our_flops_are_those_others_count() -> None:
    """Megatron-Bridge prints 338 TFLOP/s at 1,297 tokens/s: the same FLOPs a token, MTP counted."""
    ours = train_flops_per_token(ModelConfig.preset("v3-671b"), 4096)
    assert ours == pytest.approx(338e12 / 1297, rel=0.002)
    assert ours == pytest.approx(699e12 / 2689, rel=0.004)


def test_parts_by_hand() -> None:
    config = tiny_config(num_nextn_predict_layers=1)
    parts = train_flops_by_part(config, 8)
    found = counts(config)
    assert parts["routed experts"] == 6 * found.activated_parts["routed experts"]
    assert parts["gate"] == 6 * found.parts["gate"]
    assert parts["attention scores"] == 3 * 3 * 3 * (18 + 14) * 9
    assert parts["MTP attention scores"] == parts["attention scores"] // 3
    assert parts["MTP head"] == parts["head"] == 6 * 61 * 40
    assert parts["MTP joining"] == 6 * 2 * 40 * 40
    alone = train_flops_by_part(config, 8, mtp=False)
    assert alone == {part: flops for part, flops in parts.items() if not part.startswith("MTP")}


def test_fp8_is_what_the_report_says() -> None:
    """Report 3.3.1: Linears of attention, MLPs and experts; not head, gate, scores, eh_proj."""
    parts = train_flops_by_part(ModelConfig.preset("v3-671b"), 4096)
    low = {part for part in parts if cost.is_fp8(part)}
    assert {part.removeprefix("MTP ") for part in low} == {
        "attention", "dense MLP", "routed experts", "shared experts",
    }  # fmt: skip
    assert {"head", "gate", "attention scores", "MTP joining"} <= set(parts) - low


def test_terms_add_up_and_bubble_is_the_formulas(efficiency: float) -> None:
    """DualPipe, P = 16, M = 120, F : B : W = 1 : 2 : 1: 14 of 360 (report 3.2.1)."""
    found = estimate(report_run(), efficiency)
    terms = (found.fp8, found.bf16, found.again, found.multiprocessors, found.exposed, found.tensor)
    assert found.bubble == pytest.approx(sum(terms) * 14 / 360)
    assert found.seconds == pytest.approx(sum(terms) + found.bubble)
    assert found.multiprocessors == pytest.approx((found.fp8 + found.bf16 + found.again) * 20 / 112)
    once = estimate(replace(report_run(), layout=Layout(2048, 16, "1f1b", 1, 64)), efficiency)
    assert once.hidden == once.multiprocessors == 0
    working = once.fp8 + once.bf16 + once.again + once.exposed
    assert once.bubble == pytest.approx(working * 15 / 120)
    assert once.exposed == pytest.approx(found.exposed + found.hidden)


def test_one_gpu_has_products_alone() -> None:
    config = tiny_config()
    found = estimate(Run(config, Layout(1), hardware("h100"), 64, 8, "bf16"), 0.5)
    assert found.exposed == found.bubble == found.tensor == found.multiprocessors == found.fp8 == 0
    assert found.bf16 == pytest.approx(train_flops_per_token(config, 64) / (0.5 * 989.4e12))
    fast = estimate(Run(config, Layout(1), hardware("h100"), 64, 8, "fp8"), 0.5)
    assert fast.fp8 > 0 and fast.seconds < found.seconds
    assert estimate(Run(config, Layout(1), hardware("h100"), 64, 8), 1.0).seconds == fast.seconds / 2


def test_recomputing_by_hand() -> None:
    config = ModelConfig.preset("v3-671b")
    again = cost.again_by_part(report_run(), Assumptions())
    scores = train_flops_by_part(config, 4096)
    counted = scores["attention scores"] + scores["MTP attention scores"]
    assert again["attention scores"] == pytest.approx(
        counted * 0.2
    )  # one product of 192 of three (192 + 128)
    assert again["attention"] == 2 * 62 * (1536 * 128 * 192 + 512 * 128 * 256)


def test_copies_of_a_token() -> None:
    """Node-limited routing (report 2.1.2): at most 4 nodes; each of 8 is reached by half of the tokens."""
    config = ModelConfig.preset("v3-671b")
    h800, gb200 = hardware("h800"), hardware("gb200")
    assert alltoall.route(config, 64, h800).copies == pytest.approx(7 * 0.5)
    assert alltoall.route(config, 32, h800).copies == pytest.approx(3 * (1 - comb(6, 4) / comb(8, 4)))
    assert alltoall.route(config, 8, h800).copies == pytest.approx(3.5)  # GPUs of a node, over NVLink
    assert alltoall.route(config, 8, h800).rate == pytest.approx(144e9)
    assert alltoall.route(config, 1, h800).copies == 0
    assert alltoall.route(config, 64, gb200).rate == pytest.approx(810e9)
    assert alltoall.route(config, 144, h800, deduplicated=False).copies == pytest.approx(8 * 17 / 18)
    way = alltoall.route(config, 64, h800)
    assert alltoall.seconds(config, 1, way) == pytest.approx(3.5 * (7168 + 224 + 14336) / 45e9)
    assert alltoall.seconds(config, 2, way, fp8_dispatch=False) == pytest.approx(7 * 28672 / 45e9)
    assert alltoall.moe_layers(config, True) == 59


def test_sensitivity_changes_one_thing_at_a_time(efficiency: float) -> None:
    rows = cost.sensitivity(efficiency)
    assert rows[0]["change"] == pytest.approx(0, abs=1e-9) and len(rows) == 11
    change = {str(row["assumption"]): float(row["change"]) for row in rows}
    assert change["efficiency 10% lower"] > 0.09
    assert change["no FP8: products in BF16"] > 0.5
    assert change["no bubble"] == pytest.approx(-14 / 374)
    assert 0 < change["links at 70% of their rate, not 90%"] < 0.1
    assert change["dispatch in BF16"] > 0
    assert all(change[name] < 0 for name in change if name.startswith(("no multi", "all-to-all", "scores")))


def test_calibration_refuses_what_leaves_no_time() -> None:
    with pytest.raises(UserError, match="no time for its products"):
        calibrate(Assumptions(sm_share=0.9, times=Times()))


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(gpus=2040), "try --gpus 2048"),
        (dict(expert=96), r"expert \(96\) must divide gpus / pipeline \(128\).*try --expert 128"),
        (dict(gpus=16 * 768, expert=768), r"n_routed_experts \(256\); try --expert 256"),
        (dict(pipeline=0), r"pipeline \(0\)"),
    ],
)
def test_impossible_layouts_are_refused(changes: dict[str, int], said: str) -> None:
    layout = replace(cost.REPORT_LAYOUT, **changes)
    with pytest.raises(UserError, match=said):
        cost.check(replace(report_run(), layout=layout))
    with pytest.raises(UserError, match="try --batch 15360"):
        cost.check(replace(report_run(), batch=15300))


def test_hardware_is_ordered_and_named() -> None:
    """Dense figures: FP8 is twice BF16; nothing twice too fast, as figures with sparsity would be."""
    for machine in HARDWARE.values():
        assert machine.source
        if machine.bf16:
            assert machine.fp8 == pytest.approx(2 * machine.bf16, rel=1e-3) and machine.bf16 < 3e15
    assert HARDWARE["h800"].nvlink < HARDWARE["h100"].nvlink
    with pytest.raises(UserError, match="did you mean h100"):
        hardware("h10")
    with pytest.raises(UserError, match="pc-384"):
        hardware("pc-384")
    assert hardware("pc-384", products=False).bandwidth == 8 * 4800e6 * 8
