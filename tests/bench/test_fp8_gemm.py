"""The GPU benchmark's arithmetic and what it hands to whom, with a stand-in for the GPU and for its clock."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from dsv3.bench import fp8_gemm
from dsv3.bench.gpu_timer import Calls
from dsv3.common.errors import Failure, UserError
from dsv3.ops import backend, fp8

CPU = torch.device("cpu")
SECONDS = {"bf16": 4e-6, "torch": 2e-6, "triton": 3e-6}


def stopwatch(contestants: dict[str, Calls], rounds: int) -> dict[str, list[float]]:
    """Calls everything; the middle of three rounds takes what ``SECONDS`` says."""
    for calls in contestants.values():
        for call in calls:
            call()
    return {name: [1.0, SECONDS.get(name, 1e-6), 1e-9] for name in contestants}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """A CPU that claims torch's and Triton's products: both are the reference."""
    order: dict[str, tuple[str, ...]] = dict.fromkeys(backend.ORDER, ("triton", "reference"))
    order["linear"] = ("torch", "triton", "reference")
    fake = types.SimpleNamespace(
        takes_linear=lambda *operands: True,
        linear=fp8.linear,
        takes_wgrad=lambda *operands: True,
        wgrad=fp8.wgrad,
    )
    monkeypatch.setattr(
        backend, "choose", lambda name, device: backend.Choice(name, order[name], {"deepgemm": "no"})
    )
    monkeypatch.setattr(backend, "implementation", lambda name: fake)
    monkeypatch.setattr(backend, "_by_triton", lambda *what: False)
    monkeypatch.setattr(backend, "transposed", lambda w: w)
    monkeypatch.setattr(fp8_gemm, "gpu", lambda: CPU)
    monkeypatch.setattr(fp8_gemm, "machine", lambda device: {"device": device})
    monkeypatch.setattr(fp8_gemm, "PEAK", 16)
    monkeypatch.setattr(fp8_gemm, "QUANTISED", (32, 256))
    monkeypatch.setattr(fp8_gemm, "CACHE", 200_000)
    return order


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for run in (fp8_gemm.bench, fp8_gemm.train_step):
        with pytest.raises(UserError, match="needs a CUDA device, and there is none; --ablation"):
            run()


def test_the_products_are_the_real_models() -> None:
    found = {name: work for name, work, _ in fp8_gemm.cases()}
    assert len(found) == 5 * (5 + 2) + 4
    assert found["linear 7168 x 2048, 64 rows"] == 2 * 64 * 7168 * 2048
    assert found["wgrad 16384 x 7168, 4096 rows"] == 2 * 4096 * 16384 * 7168
    assert found["linear 7168 x 2048, 256 experts of 128 rows"] == 2 * 256 * 128 * 7168 * 2048


def test_small_operands_exist_several_times() -> None:
    assert fp8_gemm.copies(fp8_gemm.CACHE) == 1
    assert fp8_gemm.copies(fp8_gemm.CACHE // 4) == 4
    assert fp8_gemm.copies(1) == 8


def test_speeds_and_ratios(machine: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_gemm, "GROUPED", ())
    cases = fp8_gemm.cases(rows=(8, 4096), shapes=((256, 128),))
    result = fp8_gemm.bench(found_cases=cases, timer=stopwatch, layer=False)
    linear, wgrad = "linear 256 x 128, 8 rows", "wgrad 256 x 128, 4096 rows"
    work = 2 * 8 * 256 * 128
    assert result["ours"][linear] == pytest.approx(work / 3e-6 / 1e12), "the median, not the mean"
    assert result["peers"]["torch"][linear] == pytest.approx(work / 2e-6 / 1e12)
    assert result["ratios"][f"torch:{linear}"] == pytest.approx(2 / 3)
    assert result["ratios"][f"bf16:{linear}"] == pytest.approx(4 / 3)
    assert wgrad in result["ours"] and wgrad not in result["peers"]["torch"]
    assert result["peak_bf16_tflops"] == pytest.approx(2 * 16**3 / 4e-6 / 1e12)
    assert result["quantise_gb_per_second"]["copy"] == pytest.approx(4 * 32 * 256 / 1e-6 / 1e9)
    assert result["quantise_gb_per_second"]["swiglu 1x128"] == pytest.approx(5 * 32 * 256 / 1e-6 / 1e9)
    assert result["machine"] == {"device": "cuda"}
    text = fp8_gemm.report(result)
    assert linear in text and "deepgemm: no" in text and "swiglu 1x128" in text


def test_each_contestant_makes_the_same_product(machine: dict[str, tuple[str, ...]]) -> None:
    torch.manual_seed(0)
    for found in (
        fp8_gemm.linear_case(8, 256, 128, CPU),
        fp8_gemm.wgrad_case(64, 256, 128, CPU),
    ):
        results = {name: calls[0]().float() for name, calls in found.items()}
        for name, got in results.items():
            error = (got - results["bf16"]).norm() / results["bf16"].norm()
            assert error < 0.06, name
    assert len(fp8_gemm.linear_case(8, 256, 128, CPU)["bf16"]) == fp8_gemm.copies(8 * 256 + 256 * 128)


def test_our_own_kernels_are_not_silently_left_out(machine: dict[str, tuple[str, ...]]) -> None:
    machine["wgrad"] = ("reference",)
    with pytest.raises(Failure, match="our kernels cannot be measured, wgrad"):
        fp8_gemm.bench(found_cases=[], timer=stopwatch, layer=False)


def test_a_product_that_stops_is_named(machine: dict[str, tuple[str, ...]]) -> None:
    def broken(contestants: dict[str, Calls], rounds: int) -> Any:
        raise RuntimeError("CUDA error: out of memory\nmore")

    with pytest.raises(Failure, match=r"the BF16 peak stopped: CUDA error: out of memory$"):
        fp8_gemm.bench(found_cases=[], timer=broken, layer=False)


def test_a_layers_step_runs_in_both_precisions() -> None:
    widths = dict(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_attention_heads=2, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_experts_per_tok=2,
    )  # fmt: skip
    result = fp8_gemm.train_step(16, 16, widths, rounds=1, device=CPU, timer=stopwatch)
    assert result["ratios"] == {"bf16:layer, 16 experts, 16 tokens": pytest.approx(4.0)}
    assert result["ours"]["tokens_per_second"] == pytest.approx(16 / 1e-6)
