"""The kernels of absorbed attention compile for GPUs that are not there, with DeepSeek-V3's own widths.

What they compute is tested by ``triton_mla_numbers.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from dsv3.ops import triton_mla
from tests.ops.triton_ahead import compile_for, resources

HOPPER, BLACKWELL = 90, 100
HEADS, SEQUENCES = 128, 8
# Types of queries, latents, scales and rope parts; numbers from one row to the next.
CACHES: dict[str, tuple[tuple[str, str, str | None, str], tuple[int, int, int]]] = {
    "bfloat16": (("*bf16", "*bf16", None, "*bf16"), (576, 0, 576)),
    "fp8": (("*bf16", "*fp8e4nv", "*fp32", "*bf16"), (656, 164, 328)),
    "float32": (("*fp32", "*fp32", None, "*fp32"), (576, 0, 576)),
}


def attention(capability: int, cache: str, tiling: triton_mla.Tiling, splits: int, block: int = 64) -> Any:
    (q, latents, scales, ropes), steps = CACHES[cache]
    options = dict(num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=True)
    return compile_for(
        capability, triton_mla.attend_kernel, options,
        q_MHX=q, latents=latents, scales=scales, ropes=ropes, blocks_SB="*i32", lengths_S="*i32",
        out="*fp32" if splits > 1 else q, lse_ZMH="*fp32" if splits > 1 else q, factor=0.1, first=0,
        rows=HEADS, heads=HEADS, row_tiles=HEADS // tiling.rows, all_rows=HEADS * SEQUENCES, block_row=128,
        LATENT=512, ROPE=64, C=512, R=64, BLOCK=block, SCALED=scales is not None, TILE=128, TILES=4,
        LATENT_ROW=steps[0], SCALE_ROW=steps[1], ROPE_ROW=steps[2], SPLITS=splits, ROWS=tiling.rows,
        KEYS=tiling.keys,
    )  # fmt: skip


@pytest.mark.parametrize(
    "cache, tiling, splits",
    [
        ("bfloat16", triton_mla.WIDE, 1),
        ("bfloat16", triton_mla.NARROW, 8),
        ("fp8", triton_mla.BYTES, 8),
        ("float32", triton_mla.EXACT, 8),
    ],
)
def test_rows_come_16_bytes_at_a_time_and_nothing_spills(
    cache: str, tiling: triton_mla.Tiling, splits: int, tmp_path: Path
) -> None:
    compiled = attention(HOPPER, cache, tiling, splits)
    text = compiled.asm["ptx"]
    assert not re.search(r"ld\.global\S*\.b(8|16) ", text), "no number is loaded by itself"
    assert "st.global.v4.b32" in text
    if cache != "float32":
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in text, "BF16 operands, FP32 sums"
    if cache == "bfloat16":
        assert "cp.async.cg.shared.global" in text, "the next keys are on their way meanwhile"
    assert resources(compiled, tmp_path)["STACK"] == 0
    assert compiled.metadata.shared <= 227 * 1024


def test_other_blocks_and_gpus_compile() -> None:
    assert attention(HOPPER, "bfloat16", triton_mla.NARROW, 1, block=16).asm["cubin"]
    assert attention(BLACKWELL, "bfloat16", triton_mla.WIDE, 8).asm["cubin"]


def test_joining_compiles() -> None:
    compiled = compile_for(
        HOPPER, triton_mla.join_kernel, dict(num_warps=4, enable_fp_fusion=True),
        parts_ZMHC="*fp32", lse_ZMH="*fp32", out_MHC="*bf16", all_rows=HEADS * SEQUENCES,
        LATENT=512, C=512, SPLITS=8, SPLITS_UP=8,
    )  # fmt: skip
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
