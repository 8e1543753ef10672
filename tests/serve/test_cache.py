"""The latent cache: what is written is read; FP8 rows have FlashMLA's layout."""

from __future__ import annotations

import psutil
import pytest
import torch

from dsv3.serve.cache import LatentCache, row_bytes


def filled(kind: str, latent: int = 512, rope: int = 64, tokens: int = 5) -> tuple[LatentCache, torch.Tensor]:
    cache = LatentCache(2, 12, latent, rope, kind, torch.float32)
    rows = torch.randn(tokens, latent + rope) * torch.logspace(-2, 2, tokens)[:, None]
    cache.write(1, torch.tensor([7, 3, 11, 0, 5])[:tokens], rows[:, :latent], rows[:, latent:])
    return cache, rows


@pytest.mark.parametrize("kind, error", [("float32", 0.0), ("bfloat16", 2**-8), ("fp8", 2**-4)])
@pytest.mark.parametrize("latent, rope", [(512, 64), (20, 8), (130, 6)])
def test_read_what_was_written(kind: str, error: float, latent: int, rope: int) -> None:
    cache, rows = filled(kind, latent, rope)
    found = cache.read(1, torch.tensor([7, 3, 11, 0, 5]))
    worst = rows[:, :latent].abs().amax(dim=1, keepdim=True) * 2**-9  # E4M3's spacing near zero
    assert ((found - rows).abs() <= error * rows.abs() + (worst if kind == "fp8" else 0)).all()
    assert torch.equal(cache.read(1, slice(3, 4)), found[1:2])
    assert not cache.read(0, slice(0, 12)).any()  # the other layer


def test_bytes_of_deepseek_v3() -> None:
    assert [row_bytes(512, 64, kind) for kind in ("fp8", "bfloat16", "float32")] == [656, 1152, 2304]
    assert filled("fp8")[0].nbytes == 2 * 12 * 656
    assert filled("bfloat16")[0].nbytes == 2 * 12 * 1152


def test_fp8_row_is_laid_out_as_flashmla() -> None:
    """512 E4M3 numbers, four FP32 scales (one for 128 of them), 64 BF16: read by hand from the bytes."""
    cache, rows = filled("fp8")
    row = cache.rows[1, 3]
    numbers = row[:512].view(torch.float8_e4m3fn).float().view(4, 128)
    scales = row[512:528].view(torch.float32)
    rope = row[528:656].view(torch.bfloat16)
    assert torch.equal(scales, rows[1, :512].view(4, 128).abs().amax(dim=1) / 448)
    torch.testing.assert_close((numbers * scales[:, None]).flatten(), cache.read(1, slice(3, 4))[0, :512])
    assert torch.equal(rope, rows[1, 512:].bfloat16())


def test_rows_nobody_wrote_take_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    cache = LatentCache(4, 32768, 512, 0, "float32", torch.float32)
    assert cache.nbytes == 2**28
    assert psutil.Process().memory_info().rss - before < 2**26
    assert not cache.read(3, slice(32767, 32768)).any()
