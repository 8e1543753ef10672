"""Which implementation is used, and that each is handed its operands as it wants them, without a GPU."""

from __future__ import annotations

import gc
import importlib.machinery
import logging
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.common.errors import UserError
from dsv3.ops import backend, deepgemm, fp8, library, scaled_mm
from dsv3.ops.blocks import BLOCK, COLUMN, ROW, Quantised, Tile, dequantise, quantise
from dsv3.ops.formats import E4M3

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    choose = backend.choose
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """A GPU with everything, as far as choosing goes; what stands in the dictionary is refused."""
    refusals: dict[str, str | None] = {}
    monkeypatch.setattr(backend, "_refusal", lambda name, operator, device: refusals.get(name))
    return refusals


def order(operator: str) -> tuple[str, ...]:
    return backend.choose(operator, GPU).order


def test_without_a_gpu_everything_is_the_reference() -> None:
    for choice in backend.choices(CPU):
        assert choice.order == ("reference",)
        assert set(choice.refused.values()) == {"no CUDA device"}


def test_order_of_preference(hopper: dict[str, str | None]) -> None:
    assert order("linear") == ("torch", "deepgemm", "triton", "reference")
    assert order("grouped linear") == ("deepgemm", "triton", "reference")
    assert order("grouped wgrad") == ("triton", "reference")


def test_what_is_refused_is_left_out_and_said(
    hopper: dict[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    hopper["deepgemm"] = "deep_gemm is not installed"
    with caplog.at_level(logging.INFO, logger="dsv3"):
        assert order("linear") == ("torch", "triton", "reference")
        assert order("linear") == ("torch", "triton", "reference")
    assert [record.getMessage() for record in caplog.records] == [
        "FP8 linear: torch, else triton, else reference; deepgemm not: deep_gemm is not installed"
    ]


@pytest.mark.parametrize("name", ["torch", "deepgemm", "triton", "reference"])
def test_the_variable_puts_one_first(
    name: str, hopper: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backend.VARIABLE, name)
    assert order("linear")[0] == name
    assert order("grouped wgrad")[0] == (name if name in backend.ORDER["grouped wgrad"] else "triton")
    if name == "reference":
        assert order("quantise") == order("grouped wgrad") == ("reference",)


def test_the_variable_is_checked(hopper: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "tritn")
    with pytest.raises(UserError, match=r"DSV3_FP8_GEMM \(tritn\) is unknown \(did you mean triton\?\)"):
        order("linear")
    monkeypatch.setenv(backend.VARIABLE, "deepgemm")
    hopper["deepgemm"] = "deep_gemm is not installed"
    with pytest.raises(
        UserError, match=r"DSV3_FP8_GEMM \(deepgemm\) cannot do linear: .*not installed; use auto"
    ):
        order("linear")


@pytest.mark.parametrize(
    "outcome, why", [(0.0, None), (1.0, "off by 1.0e+00"), (OSError("no ptxas"), "no ptxas")]
)
def test_an_example_decides(
    outcome: float | Exception, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of(name: str, operator: str, device: torch.device) -> float:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(backend, "error_of", error_of)
    monkeypatch.setattr(scaled_mm, "missing", lambda device: None)
    refused = backend._refusal("torch", "linear", GPU)
    assert refused is None if why is None else refused is not None and why in refused


@pytest.mark.parametrize("operator", ["linear", "wgrad", "grouped linear", "grouped wgrad"])
def test_the_example_tells_right_from_wrong(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verb = operator.split()[-1]
    right = getattr(backend.Reference, verb)
    wrong = types.SimpleNamespace(**{verb: lambda *operands: right(*operands).flip(-1)})
    monkeypatch.setattr(backend, "implementation", lambda name: backend.Reference)
    assert backend.error_of("torch", operator, CPU) < 1e-6
    monkeypatch.setattr(backend, "implementation", lambda name: wrong)
    assert backend.error_of("torch", operator, CPU) > 1


@pytest.mark.parametrize("counts", [None, [40, 0, 90]])
def test_products_and_quantisers_are_the_ones_specified(counts: list[int] | None) -> None:
    counts_E = None if counts is None else torch.tensor(counts)
    lead = () if counts is None else (3,)
    x, g, w = torch.randn(130, 200), torch.randn(130, 72), torch.randn(*lead, 72, 200)
    for tile in (ROW, COLUMN):
        found, wanted = backend.quantise(x, tile, counts_E=counts_E), quantise(x, tile, counts_E=counts_E)
        assert torch.equal(backend.dequantise(found), dequantise(wanted))
    w_block, rows, g_rows = quantise(w, BLOCK), quantise(x, ROW), quantise(g, ROW)
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(
            backend.linear(rows, w_block, counts_E, dtype), fp8.linear(rows, w_block, counts_E, dtype)
        )
        torch.testing.assert_close(
            backend.dgrad(g_rows, w_block, counts_E, dtype), fp8.dgrad(g_rows, w_block, counts_E, dtype)
        )
    columns, g_columns = quantise(x, COLUMN, counts_E=counts_E), quantise(g, COLUMN, counts_E=counts_E)
    torch.testing.assert_close(
        backend.wgrad(g_columns, columns, counts_E), fp8.wgrad(g_columns, columns, counts_E)
    )


def test_swiglu_is_silu_times_up_then_quantised() -> None:
    gate, up = torch.randn(2, 33, 150).bfloat16()
    wanted = quantise(F.silu(gate.float()) * up.float(), ROW, power_of_two_scales=True)
    found = backend.swiglu(gate, up, ROW, power_of_two_scales=True)
    assert torch.equal(dequantise(found), dequantise(wanted))


def test_weights_are_transposed_once_and_forgotten_with_them() -> None:
    w = quantise(torch.randn(2, 130, 200), BLOCK)
    turned = backend.transposed(w)
    assert backend.transposed(w).values is turned.values
    assert turned.values.is_contiguous() and turned.shape == (2, 200, 130)
    assert torch.equal(dequantise(turned), dequantise(w).mT)
    kept = len(backend._transposed)
    del w
    gc.collect()
    assert len(backend._transposed) == kept - 1


def test_a_call_goes_to_the_first_that_takes_it(
    hopper: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS has whole tiles only; what it does not take, the next implementation does."""
    asked = []
    fakes = {
        "torch": types.SimpleNamespace(
            takes_linear=scaled_mm.takes_linear, linear=lambda *x: asked.append("torch")
        ),
        "triton": types.SimpleNamespace(
            takes_linear=lambda *x: True, linear=lambda *x: asked.append("triton")
        ),
    }
    hopper["deepgemm"] = "not installed"
    choice = backend.choose("linear", GPU)
    monkeypatch.setattr(backend, "implementation", fakes.__getitem__)
    monkeypatch.setattr(backend, "choose", lambda operator, device: choice)
    for outputs in (256, 576):
        w = quantise(torch.randn(outputs, 256), BLOCK)
        backend.linear(quantise(torch.randn(8, 256), ROW), w, None, torch.bfloat16)
    assert asked == ["torch", "triton"]


def as_on_a_gpu(q: Quantised, device: str) -> Quantised:
    """Laid out as ``triton_quantise`` does: see its text."""
    values, scales = q.values, q.scales
    if q.tile == COLUMN:
        values = values.T.contiguous().T
    if q.tile == ROW:
        pitch = -(-len(scales) // 4) * 4
        scales = F.pad(scales.T, (0, pitch - len(scales))).T[: len(scales)]
    return Quantised(values.to(device), scales.to(device), q.shape, q.tile, q.kind, q.counts_E)


def laid_out(rows: int, columns: int, tile: Tile, device: str = "cpu") -> Quantised:
    return as_on_a_gpu(quantise(torch.randn(rows, columns), tile), device)


@pytest.mark.parametrize("rows, outputs, inputs", [(256, 384, 640), (130, 256, 128), (64, 7168, 2048)])
def test_torch_accepts_the_layouts_of_all_three_products(rows: int, outputs: int, inputs: int) -> None:
    """Its meta function checks what its CUDA function does."""
    x, g = laid_out(rows, inputs, ROW, "meta"), laid_out(rows, outputs, ROW, "meta")
    w = laid_out(outputs, inputs, BLOCK, "meta")
    assert scaled_mm.takes_linear(x, w, None, torch.bfloat16)
    assert scaled_mm.linear(x, w, None, torch.bfloat16).shape == (rows, outputs)
    turned = Quantised(w.values.T.contiguous(), w.scales.T, torch.Size((inputs, outputs)), BLOCK, E4M3)
    assert scaled_mm.linear(g, turned, None, torch.float32).shape == (rows, inputs)
    columns, g_columns = laid_out(rows, inputs, COLUMN, "meta"), laid_out(rows, outputs, COLUMN, "meta")
    assert scaled_mm.takes_wgrad(g_columns, columns, None) == (rows % 128 == 0)
    if rows % 128 == 0:
        assert scaled_mm.wgrad(g_columns, columns, None).shape == (outputs, inputs)


def test_torch_refuses_other_layouts() -> None:
    """The layouts above pass because they are right, not because nothing is checked."""
    x, w = quantise(torch.randn(256, 640), ROW), quantise(torch.randn(384, 640), BLOCK)
    with pytest.raises((RuntimeError, ValueError), match="stride"):
        F.scaled_mm(
            x.values.to("meta"), w.values.to("meta").T, x.scales.to("meta"), F.ScalingType.BlockWise1x128,
            w.scales.to("meta").T, F.ScalingType.BlockWise128x128, output_dtype=torch.bfloat16,
        )  # fmt: skip


def cublas(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    recipe_a: object,
    scale_b: Tensor,
    recipe_b: object,
    output_dtype: torch.dtype,
) -> Tensor:
    """What ``F.scaled_mm`` is documented to do, slowly: ``a [M, K]``, ``b [K, N]``."""
    assert a.stride(1) == 1 and b.stride(0) == 1 and len(a) % 4 == 0
    k, n = torch.arange(a.shape[1]), torch.arange(b.shape[1])
    left = a.double() * scale_a[:, k // 128]
    if recipe_b == F.ScalingType.BlockWise128x128:
        right = b.double() * scale_b[k // 128][:, n // 128]
    else:
        right = b.double() * scale_b[:, k // 128].T
    return (left @ right).to(output_dtype)


@pytest.mark.parametrize("rows", [128, 129])
def test_torch_is_given_the_right_numbers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", cublas)
    x, w = laid_out(rows, 640, ROW), laid_out(256, 640, BLOCK)
    torch.testing.assert_close(
        scaled_mm.linear(x, w, None, torch.float32), dequantise(x) @ dequantise(w).T, rtol=1e-4, atol=1e-4
    )
    g, x = laid_out(256, 128, COLUMN), laid_out(256, 384, COLUMN)
    torch.testing.assert_close(
        scaled_mm.wgrad(g, x, None), dequantise(g).T @ dequantise(x), rtol=1e-4, atol=1e-4
    )


class DeepGEMM(types.ModuleType):
    """What DeepGEMM is documented to do, slowly; segments of experts begin at multiples of 64."""

    def __init__(self) -> None:
        super().__init__("deep_gemm")
        self.__spec__ = importlib.machinery.ModuleSpec("deep_gemm", None)

    @staticmethod
    def get_mk_alignment_for_contiguous_layout() -> int:
        return 64

    @staticmethod
    def fp8_gemm_nt(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor) -> None:
        assert a[0].is_contiguous() and b[0].is_contiguous()
        k, n = torch.arange(a[0].shape[1]), torch.arange(len(b[0]))
        left, right = a[0].double() * a[1][:, k // 128], b[0].double() * b[1][n // 128][:, k // 128]
        d.copy_(left @ right.T)

    @classmethod
    def m_grouped_fp8_gemm_nt_contiguous(
        cls, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, m_indices: Tensor
    ) -> None:
        assert len(m_indices) % 64 == 0 and m_indices.dtype == torch.int32 and d.dtype == torch.bfloat16
        d.fill_(float("nan"))
        for first in range(0, len(m_indices), 64):
            rows, expert = slice(first, first + 64), int(m_indices[first])
            assert set(m_indices[rows].tolist()) <= {expert, -1}
            if expert >= 0:
                cls.fp8_gemm_nt((a[0][rows], a[1][rows]), (b[0][expert], b[1][expert]), d[rows])


@pytest.mark.parametrize("counts", [None, [70, 0, 1, 64, 65], [0, 0, 0, 0, 200]])
def test_deepgemm_is_given_the_right_numbers(
    counts: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", DeepGEMM())
    counts_E = None if counts is None else torch.tensor(counts)
    x = laid_out(200, 384, ROW)
    w = quantise(torch.randn(*(() if counts is None else (5,)), 256, 384), BLOCK)
    assert deepgemm.takes_linear(x, w, counts_E, torch.bfloat16)
    found = deepgemm.linear(x, w, counts_E, torch.bfloat16)
    torch.testing.assert_close(found, fp8.linear(x, w, counts_E, torch.bfloat16), rtol=1e-2, atol=1e-2)


def test_why_an_implementation_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert scaled_mm.missing(GPU) is None
    assert deepgemm.missing(GPU) == "deep_gemm is not installed"
    monkeypatch.setitem(sys.modules, "deep_gemm", DeepGEMM())
    assert deepgemm.missing(GPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert "needs compute capability 9" in str(scaled_mm.missing(GPU))
    assert "this GPU has 8.9" in str(deepgemm.missing(GPU))


def test_why_a_library_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels_of_another_torch.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert library.missing("kernels_of_nobody", GPU, 8) == "kernels_of_nobody is not installed"
    assert library.missing("json", GPU, 8) is None
    assert library.missing("json", GPU, 9) == "needs compute capability 9 or newer, this GPU has 8.9"
    assert library.missing("json", GPU, 7, 7) == "needs compute capability 7, this GPU has 8.9"
    wanted = "kernels_of_another_torch cannot be imported: OSError undefined symbol"
    assert library.missing("kernels_of_another_torch", GPU, 8) == wanted


def test_triton_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, dsv3, dsv3.ops.backend as b; b.choices(); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.gpu
def test_everything_there_is_agrees_with_the_reference() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for choice in backend.choices(device):
        print(choice)
        for name in choice.order:
            if name != "reference":
                assert backend.error_of(name, choice.operator, device) <= backend.LARGEST_ERROR
