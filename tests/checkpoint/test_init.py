"""Folders of random weights: the same in every format, by any number of threads, after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.hf import load
from dsv3.checkpoint.init import Drawn, init
from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from tests.checkpoint.conftest import SMALL, same

CONFIG = ModelConfig(**{**SMALL, "hidden_size": 160, "intermediate_size": 272, "num_hidden_layers": 2})


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init") / "fp32"
    init(CONFIG, path, "fp32")
    return path


def test_weights_are_those_training_begins_with(fp32: Path) -> None:
    """N(0, initializer_range), norms one, biases zero; no two tensors alike but the MTP layers' copies."""
    model = load(fp32)  # which would warn of copies that differ
    assert model.config == CONFIG
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            assert bool((tensor == (0 if name.endswith("bias") else 1)).all()), name
            continue
        for part in tensor if tensor.dim() == 3 else [tensor]:
            near = 5 / part.numel() ** 0.5
            assert float(part.std()) == pytest.approx(0.2, rel=near), name
            assert abs(float(part.mean())) < 0.2 * near, name
            seen.add(float(part[0, 0]))
            seen.add(float(part[-1, -1]))
    matrices = sum(t.shape[0] if t.dim() == 3 else 1 for t in model.state_dict().values() if t.dim() > 1)
    assert len(seen) == 2 * matrices


@pytest.mark.parametrize("to", ["bf16", "fp8", "int8", "int4"])
def test_every_format_is_made_of_the_same_weights(fp32: Path, tmp_path: Path, to: str) -> None:
    init(CONFIG, tmp_path / "a", to)
    convert(fp32, tmp_path / "b", to)
    assert same(load(tmp_path / "a"), load(tmp_path / "b"))
    if to.startswith("int"):
        assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_bands_are_drawn_apart() -> None:
    with torch.device("meta"):
        model = DeepSeekV3(CONFIG)
    drawn = Drawn(model, seed=0)
    name, copy = "lm_head.weight", "model.layers.2.shared_head.head.weight"
    bands = [drawn.rows(name, first, first + 32) for first in (0, 32, 64)]
    assert all(band.shape == (32, 160) for band in bands) and len({float(band[0, 0]) for band in bands}) == 3
    assert torch.equal(drawn.rows(name, 32, 64), bands[1]) and torch.equal(drawn.rows(copy, 32, 64), bands[1])


def test_seeds_threads_and_groups(fp32: Path, tmp_path: Path) -> None:
    init(CONFIG, tmp_path / "a", "fp32", workers=5)
    assert _files(tmp_path / "a") == _files(fp32)
    init(CONFIG, tmp_path / "b", "fp32", seed=1)
    assert not torch.equal(load(tmp_path / "b").lm_head.weight, load(fp32).lm_head.weight)
    made = init(CONFIG, tmp_path / "c", "int4", group=32)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]["group_size"] == 32
    sizes = {path.stat().st_size for path in (tmp_path / "c").glob("*.safetensors")}
    assert made.written_bytes < sum(sizes) < made.written_bytes + 20_000
    main = sum(parameter.numel() for parameter in load(fp32).parameters())
    buffers = sum(buffer.numel() for buffer in load(fp32).buffers())
    assert made.parameters == main + buffers + 2 * 96 * 160  # the MTP layer's copies


def test_interrupted_and_continued(fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(CONFIG, tmp_path / "a", "int8")
    with monkeypatch.context() as patch:
        original, left = os.pwrite, [3]

        def pwrite(descriptor: int, content: memoryview, place: int) -> int:
            left[0] -= place == 0
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(descriptor, content, place)

        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(KeyboardInterrupt):
            init(CONFIG, tmp_path / "x", "int8", workers=1)
    assert len(list((tmp_path / ".tmp-convert-x" / "model").iterdir())) == 3
    made = init(CONFIG, tmp_path / "x", "int8")
    assert _files(tmp_path / "x") == _files(tmp_path / "a")
    assert made.written_bytes < sum(len(content) for content in _files(tmp_path / "a").values()) * 0.9


def test_a_tokenizer_goes_along(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(UserError, match=r"--tokenizer .* holds no tokenizer\.json"):
        init(CONFIG, tmp_path / "a", "bf16", tokenizer=tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    (tmp_path / "t" / "other.py").write_text("")
    init(CONFIG, tmp_path / "a", "bf16", tokenizer=tmp_path / "t")
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}" and not (
        tmp_path / "a" / "other.py"
    ).exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"to": "int5"}, r"--to \(int5\) is unknown \(did you mean int4\?\)|--to \(int5\) is unknown"),
        ({"to": "bf16", "group": 32}, r"--group \(32\) is for int4"),
        ({"to": "int4", "group": 7}, r"--group \(7\) must be one of"),
        ({"workers": 0}, r"--workers \(0\)"),
        ({"folder": "."}, "already exists"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    folder = tmp_path / arguments.pop("folder", "x")
    with pytest.raises(UserError, match=says):
        init(CONFIG, folder, **arguments)
    assert not list(tmp_path.iterdir())
