"""The ablation's arithmetic on made-up runs, a real one of a few steps, and the bytes a layer keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dsv3.bench import fp8_ablation, fp8_memory
from dsv3.bench.paired import Run, command, interval
from dsv3.common.errors import UserError


def write_run(folder: Path, losses: list[float], bits: float) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines.append({"step": len(losses), "validation_bits_per_byte": bits})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_gaps_are_percent_of_the_reference(tmp_path: Path) -> None:
    falling = [8.0 - step / 100 for step in range(400)]
    worse = [loss * (1.01 if 200 <= step < 300 else 1.0) for step, loss in enumerate(falling)]
    made = {
        ("fp32", 0): (falling, 2.0),
        ("fp8", 0): ([1.002 * loss for loss in falling], 2.01),
        ("14-bit", 0): (worse, 2.0),
        ("fp32", 1): ([1.1 * loss for loss in falling], 2.2),  # each is compared with its own seed's
        ("fp8", 1): ([1.1 * 1.004 * loss for loss in falling], 2.2),
    }
    runs = []
    for (name, seed), (losses, bits) in made.items():
        runs.append(Run(name, seed, tmp_path / f"seed-{seed}" / name))
        write_run(runs[-1].folder, losses, bits)
    result = fp8_ablation.compare(runs)
    fp8, spike = result["variations"]["fp8"], result["variations"]["14-bit"]
    assert fp8["seeds"] == [0, 1] and spike["seeds"] == [0]
    assert fp8["final_gap_percent"] == pytest.approx([0.2, 0.4])
    assert fp8["greatest_gap_percent"] == pytest.approx([0.2, 0.4])
    assert fp8["held_out_gap_percent"] == pytest.approx([0.5, 0.0])
    assert spike["final_gap_percent"] == pytest.approx([0.0], abs=0.02)
    assert spike["greatest_gap_percent"] == pytest.approx([1.0], abs=0.02)
    text = fp8_ablation.report(result)
    assert "+0.30 +-0.10 %" in text and "within 0.25 %" in text
    fp8_ablation.draw(runs, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes()[:4] == b"\x89PNG"


def test_smoothing_uses_whole_windows() -> None:
    assert fp8_ablation.smooth(np.arange(5.0), 2).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert len(fp8_ablation.gap_percent(np.ones(7), np.ones(9))) == 7
    assert math.isclose(fp8_ablation.gap_percent(np.full(8, 3.0), np.full(8, 2.0))[0], 50.0)


def test_an_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 4.0])
    assert math.isclose(mean, 7 / 3) and math.isclose(
        half, 4.303 * math.sqrt(7 / 3) / math.sqrt(3), rel_tol=1e-3
    )
    assert interval([5.0]) == (5.0, math.inf)


def test_variations_differ_from_the_full_recipe_in_what_they_say(tmp_path: Path) -> None:
    commands = {
        name: command(Run(name, 0, tmp_path / name, fp8_ablation.variation(name)), 10, "data")[5:-2]
        for name in fp8_ablation.VARIATIONS
    }
    plain = [word for word in commands["fp32"] if not word.endswith("fp32")]
    assert "fp8" not in plain
    assert commands["gradient-blocks"][-2:] == ["--fp8.gradient_tile", "128x128"]
    assert len({tuple(words) for words in commands.values()}) == len(commands)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data"):
        fp8_ablation.ablation(tmp_path / "out", 20, [0], str(tmp_path / "nowhere"), 1, [])
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="--only"):
        fp8_ablation.ablation(tmp_path / "out", 20, [0], str(tmp_path), 1, ["bf8"])
    assert not (tmp_path / "out").exists()


def test_fp8_keeps_less_than_bf16_and_that_less_than_fp32() -> None:
    """On a small layer; exact for FP32's Linears, whose inputs can be counted by hand."""
    widths = dict(
        hidden_size=256, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=128,
        num_attention_heads=2, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
    )  # fmt: skip
    result = fp8_memory.bench(widths)
    sizes = result["bytes_per_token_per_layer"]
    assert sizes["FP32"] > sizes["BF16"] > sizes["FP8"] > sizes["FP8, recompute"]
    assert sizes["BF16"] > sizes["BF16, recompute"]
    # FP32: eight rows in, out, and both inputs of SwiGLU, for the routed experts alone.
    assert sizes["FP32"] > 4 * 8 * (2 * 256 + 2 * 128)
    assert "KiB a token" in fp8_memory.report(result)
