"""The GPU benchmark's arithmetic and what it hands to whom, with a stand-in for the GPU and for its clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dsv3.bench import mla_decode
from dsv3.bench.gpu_timer import Calls
from dsv3.bench.mla_decode import Case
from dsv3.cli.main import app
from dsv3.common.errors import Failure, UserError
from dsv3.ops.backend import Choice
from dsv3.serve import absorbed

SECONDS = {"copy": 1e-3, "triton": 2e-6, "flashmla": 1e-6, "reference": 8e-6}
SMALL = (Case(2, 3, 70), Case(2, 2, 64, new=2, cache="fp8"))


def stopwatch(contestants: dict[str, Calls], rounds: int) -> dict[str, list[float]]:
    """Calls everything; the middle of three rounds takes what ``SECONDS`` says."""
    for calls in contestants.values():
        for call in calls:
            call()
    return {name: [1.0, SECONDS[name], 1e-9] for name in contestants}


class Stand:
    """In for a kernel: it gathers."""

    @staticmethod
    def attend(q: Any, rows: torch.Tensor, table: Any, latent: int, scale: float) -> torch.Tensor:
        kind = "fp8" if rows.dtype == torch.uint8 else "bfloat16"
        cache = absorbed.LatentCache(1, len(rows), latent, 64, kind, torch.bfloat16, block=table.block)
        cache.rows[0] = rows
        return absorbed.attend_reference(q, cache, 0, table, scale)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU that claims the kernels."""
    found = ["flashmla", "triton", "reference"]
    monkeypatch.setattr(
        absorbed, "choose", lambda sizes: Choice("decode", tuple(found), {"other": "no"}, "MLA")
    )
    monkeypatch.setattr(absorbed, "implementation", lambda name: Stand)
    monkeypatch.setattr(mla_decode, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(mla_decode, "machine", lambda device: {"device": device})
    monkeypatch.setattr(mla_decode, "COPIED", 1 << 12)
    monkeypatch.setattr("dsv3.bench.fp8_gemm.CACHE", 500_000)
    return found


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", "mla"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "this needs a CUDA device, and there is none"


def test_bytes_of_a_step() -> None:
    assert Case(128, 32, 4096).nbytes == 32 * 4096 * 1152 + 32 * 128 * (576 + 512) * 2
    assert Case(16, 1, 100, 2, "fp8").nbytes == 100 * 656 + 2 * 16 * (576 + 512) * 2


def test_speeds_and_ratios(order: list[str]) -> None:
    result = mla_decode.bench(3, SMALL, stopwatch)
    case = "bfloat16, 2 heads, 3 x 70 keys"
    speed = SMALL[0].nbytes / 2e-6 / 1e9
    assert result["ours"][case] == pytest.approx(speed), "the median, not the mean"
    assert result["peers"]["copy"] == pytest.approx(2 * 4096 / 1e-3 / 1e9)
    assert result["ratios"][f"copy:{case}"] == pytest.approx(speed / result["peers"]["copy"])
    assert result["ratios"][f"flashmla:{case}"] == pytest.approx(0.5)
    assert result["ratios"]["reference:fp8, 2 heads, 2 x 64 keys, 2 tokens each"] == pytest.approx(4)
    assert result["machine"] == {"device": "cuda"}
    text = mla_decode.report(result)
    assert case in text and "fp8 by other: no" in text and "copying reads and writes" in text


def test_each_contestant_attends_to_the_same(order: list[str]) -> None:
    for case in SMALL:
        found, _ = mla_decode.contestants(case, torch.device("cpu"))
        assert len(found["triton"]) > 1, "a small cache exists several times"
        shape = (case.sequences * case.new, case.heads, 512)
        results = [calls[0]() for calls in found.values()]
        assert all(isinstance(out, torch.Tensor) and out.shape == shape for out in results)
        assert all(torch.equal(out, results[0]) for out in results)  # type: ignore[arg-type]


def test_our_own_kernel_is_not_silently_left_out(order: list[str]) -> None:
    order.remove("triton")
    with pytest.raises(Failure, match="our kernel cannot be measured, bfloat16, 2 heads, 3 x 70 keys"):
        mla_decode.bench(1, SMALL, stopwatch)


def test_a_case_that_stops_is_named(order: list[str]) -> None:
    def broken(contestants: dict[str, Calls], rounds: int) -> Any:
        if "copy" in contestants:
            return {"copy": [1.0]}
        raise RuntimeError("CUDA error: out of memory\nmore")

    with pytest.raises(Failure, match=r"2 heads, 3 x 70 keys stopped: CUDA error: out of memory$"):
        mla_decode.bench(1, SMALL, broken)
