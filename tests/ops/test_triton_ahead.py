"""The Triton kernels compile for GPUs that are not there, to the instructions they are written for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from dsv3.ops import triton_gemm, triton_quantise
from dsv3.ops.blocks import BLOCK, COLUMN, ROW, Tile
from dsv3.ops.formats import E4M3, E5M2, E5M6, Format
from tests.ops.triton_ahead import compile_for, resources

HOPPER, BLACKWELL = 90, 100
M, N, K = 4096, 2048, 7168  # of a routed expert's projections
TYPES = {"e4m3": "*fp8e4nv", "e5m2": "*fp8e5", "e5m6": "*u8"}


def fp8_tile(rows: int) -> str:
    return f"tensordesc<fp8e4nv[{rows}, {triton_gemm.DEPTH}]>"


def product(capability: int, name: str, tiling: triton_gemm.Tiling, experts: int, rows: int = M) -> Any:
    """``linear_kernel`` or ``wgrad_kernel`` as it is launched."""
    same: dict[str, Any] = dict(
        counts_E="*i64" if experts else None, M=rows, N=N, K=K, x_scales="*fp32",
        EXPERTS=experts, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=triton_gemm.DEPTH,
    )  # fmt: skip
    options = dict(num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=False)
    if name == "linear":
        return compile_for(
            capability, triton_gemm.linear_kernel, options, **same,
            x_MK=fp8_tile(tiling.rows), w_ENK=fp8_tile(tiling.columns), w_scales="*fp32", out_MN="*bf16",
            x_scale_row=1, x_scale_column=M, w_scale_expert=N * K // 128**2, w_scale_row=K // 128,
            w_scale_column=1, ROW_TILES=-(-rows // tiling.rows),
        )  # fmt: skip
    return compile_for(
        capability, triton_gemm.wgrad_kernel, options, **same,
        g_NM=fp8_tile(tiling.rows), x_KM=fp8_tile(tiling.columns), g_scales="*fp32", out_ENK="*fp32",
        g_scale_row=N, g_scale_column=1, x_scale_row=K, x_scale_column=1,
    )  # fmt: skip


LARGE, *SMALLER = triton_gemm.TILINGS


@pytest.mark.parametrize(
    "name, tiling, experts",
    [
        ("linear", LARGE, 0),
        ("linear", LARGE, 256),
        ("wgrad", LARGE, 256),
        ("linear", SMALLER[-1], 0),
        *(pytest.param("linear", tiling, 0, marks=pytest.mark.slow) for tiling in SMALLER[:-1]),
        *(pytest.param("wgrad", tiling, 0, marks=pytest.mark.slow) for tiling in triton_gemm.TILINGS),
    ],
)
def test_products_use_hoppers_matrix_instruction(
    name: str, tiling: triton_gemm.Tiling, experts: int, tmp_path: Path
) -> None:
    compiled = product(HOPPER, name, tiling, experts)
    text = compiled.asm["ptx"]
    assert re.search(r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", text), "FP8 operands, FP32 sums"
    assert "cp.async.bulk.tensor.2d" in text, "operands come by the copy engine"
    assert "mma.sync" not in text
    # Every partial sum begins with zero and is awaited: the FP32 total is no accumulator of the instruction.
    loop = compiled.asm["ttgir"].split("scf.for", 1)[1]
    assert re.search(r"warp_group_dot %\S+, %\S+, %cst", loop) and "math.fma" in loop
    assert resources(compiled, tmp_path)["STACK"] == 0, "nothing spills"
    assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("name", ["linear", "wgrad"])
def test_products_compile_for_blackwell(name: str) -> None:
    compiled = product(BLACKWELL, name, LARGE, 8)
    assert "tcgen05.mma" in compiled.asm["ptx"] and compiled.asm["cubin"]


def test_products_compile_for_a_single_row() -> None:
    """A launch compiles in what is 1, as numbers Triton treats differently."""
    assert product(HOPPER, "linear", SMALLER[-1], 0, rows=1).asm["cubin"]


def quantiser(capability: int, tile: Tile, kind: Format, experts: int, gated: bool) -> Any:
    rows, columns, warps = triton_quantise.PROGRAMS[tile]
    width = K * kind.bits // 8
    return compile_for(
        capability, triton_quantise.quantise_kernel, dict(num_warps=warps, enable_fp_fusion=False),
        x_BMK="*bf16", up_BMK="*bf16", counts_E="*i64" if experts else None, values_BMK=TYPES[kind.name],
        scales_BMK="*fp32", M=M, K=K, smallest_amax=1e-4,
        x_batch=M * K, x_row=K, x_column=1, up_batch=M * K, up_row=K, up_column=1,
        value_batch=M * width, value_row=1 if tile == COLUMN else width,
        value_column=M if tile == COLUMN else 1, scale_batch=M * 64,
        scale_row=1 if tile == ROW else K, scale_column=M if tile == ROW else 1,
        EXPERTS=experts, ROWS=rows, COLUMNS=columns, TILE_ROWS=tile.rows, TILE_COLUMNS=tile.columns,
        GATED=gated, KEEP_SMALL=False, POWER_OF_TWO=True, LARGEST=kind.largest,
        MANTISSA=kind.mantissa, SMALLEST_EXPONENT=kind.smallest_exponent, BITS=kind.bits,
    )  # fmt: skip


@pytest.mark.parametrize(
    "tile, kind, experts, gated",
    [
        (ROW, E4M3, 0, False),
        (ROW, E4M3, 0, True),
        (ROW, E5M2, 0, False),
        (COLUMN, E4M3, 0, False),
        (COLUMN, E4M3, 256, True),
        (BLOCK, E4M3, 0, False),
    ],
)
def test_quantisers_round_in_hardware_and_move_16_bytes(
    tile: Tile, kind: Format, experts: int, gated: bool, tmp_path: Path
) -> None:
    compiled = quantiser(HOPPER, tile, kind, experts, gated)
    text = compiled.asm["ptx"]
    assert f"cvt.rn.satfinite.{kind.name}x2.f32" in text
    assert "ld.global.v4.b32" in text and "st.global.v4.b32" in text
    assert "st.global.b8" not in text
    assert resources(compiled, tmp_path)["STACK"] == 0


def test_e5m6_compiles_and_does_not_spill(tmp_path: Path) -> None:
    assert resources(quantiser(HOPPER, ROW, E5M6, 0, False), tmp_path)["STACK"] == 0


def test_quantisers_compile_for_blackwell() -> None:
    assert "cvt.rn.satfinite.e4m3x2.f32" in quantiser(BLACKWELL, ROW, E4M3, 0, False).asm["ptx"]


@pytest.mark.parametrize("tile, kind, experts", [(ROW, E5M6, 0), (ROW, E4M3, 0), (COLUMN, E4M3, 8)])
def test_dequantise_compiles(tile: Tile, kind: Format, experts: int) -> None:
    rows, columns, warps = triton_quantise.PROGRAMS[tile]
    width = K * kind.bits // 8
    compiled = compile_for(
        HOPPER, triton_quantise.dequantise_kernel, dict(num_warps=warps, enable_fp_fusion=False),
        values_BMK=TYPES[kind.name], scales_BMK="*fp32", counts_E="*i64" if experts else None,
        out_BMK="*fp32", M=M, K=K, value_batch=M * width, value_row=1 if tile == COLUMN else width,
        value_column=M if tile == COLUMN else 1, scale_batch=M * 64, scale_row=1 if tile == ROW else K,
        scale_column=M if tile == ROW else 1, EXPERTS=experts, ROWS=rows, COLUMNS=columns,
        TILE_ROWS=tile.rows, TILE_COLUMNS=tile.columns, BITS=kind.bits,
    )  # fmt: skip
    assert "st.global.v4.b32" in compiled.asm["ptx"]


def test_transpose_compiles() -> None:
    compiled = compile_for(
        HOPPER, triton_gemm.transpose_kernel, dict(num_warps=8, enable_fp_fusion=False),
        x_BNK="*u8", out_BKN="*u8", N=N, K=K, x_row=K, out_row=N, SIDE=128,
    )  # fmt: skip
    assert "ld.global.v4.b32" in compiled.asm["ptx"] and "st.global.v4.b32" in compiled.asm["ptx"]
