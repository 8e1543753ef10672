"""``import dsv3``: light, and with the names others build on."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dsv3


def test_names() -> None:
    for name in ("ModelConfig", "DeepSeekV3", "load", "save", "UserError", "__version__"):
        assert name in dsv3.__all__ and name in dir(dsv3)
        assert getattr(dsv3, name) is getattr(dsv3, name)
    assert set(dsv3._HOME) | {"__version__"} == set(dsv3.__all__)
    from dsv3.checkpoint.hf import load
    from dsv3.model import DeepSeekV3

    assert dsv3.load is load and dsv3.DeepSeekV3 is DeepSeekV3


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = dsv3.laod  # type: ignore[attr-defined]


def test_version() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert dsv3.__version__ == project["version"]


def test_import_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import dsv3; took = time.perf_counter() - start;"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy; dsv3.ModelConfig; assert 'torch' not in sys.modules; print(took)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


def test_from_config_to_file_and_back(tmp_path: Path) -> None:
    """The lines of the README, small."""
    import torch

    config = dsv3.ModelConfig.preset("tiny", num_hidden_layers=2, vocab_size=512)
    model = dsv3.DeepSeekV3(config)
    dsv3.save(model, tmp_path / "model")
    again = dsv3.load(tmp_path / "model", dtype=torch.bfloat16, device="cpu", quantize=None)
    assert again.config == config
    assert dsv3.ModelConfig.from_pretrained(tmp_path / "model").hidden_size == config.hidden_size
    out = again(torch.randint(0, 512, (1, 8)))
    assert out.logits_BTV.shape == (1, 8, 512) and len(out.mtp_logits) == 1
    with pytest.raises(dsv3.UserError, match="already exists"):
        dsv3.save(model, tmp_path / "model")
