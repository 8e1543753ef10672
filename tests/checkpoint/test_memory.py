"""Loading and saving take the model's memory and little more: measured in a process of its own.

The peak is the kernel's VmHWM. (``getrusage`` would not do: a child inherits its parent's high-water mark.)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint import run
from dsv3.checkpoint.hf import save
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3

MEASURE = """
import json, re, sys
from pathlib import Path
import torch, dsv3
from dsv3.checkpoint import hf, run
from dsv3.checkpoint.hf import load, save
torch.set_num_threads(1)
torch.empty(8).bfloat16().float()
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
folder, dtype, job = sys.argv[1:]
if job == "convert":
    from dsv3.checkpoint.convert import convert
    from dsv3.ops.native import library
    library("quantise")
    base = peak()
    convert(folder, folder + ".fp8", "fp8", workers=2)
    found = {"there": peak() - base}
    convert(folder + ".fp8", folder + ".bf16", "bf16", workers=2)
    found["and_back"] = peak() - base
    convert(folder + ".bf16", folder + ".int4", "int4", workers=2)
    print(json.dumps({**found, "to_int4": peak() - base}))
    sys.exit()
base = peak()
quantize = "fp8" if dtype == "fp8" else None
model = load(folder, dtype=dtype if dtype not in ("stored", "fp8") else None, quantize=quantize)
size = sum(tensor.nbytes for tensor in model.state_dict().values())
after_load = peak() - base
if job == "save":
    cast = torch.bfloat16 if dtype == "float32" else None
    save(model, folder + ".out", fp8=quantize == "fp8", dtype=cast, max_shard_bytes=150 << 20)
elif job == "run":
    run.write(folder + ".run/step-000001", model=model, tensors={}, state={})
    run.read_into(folder + ".run/step-000001", model)
print(json.dumps({"size": size, "load": after_load / size, "all": (peak() - base) / size}))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80M parameters, 320 MB in FP32, in two shards; not random: only the sizes matter here."""
    config = ModelConfig.preset("small", num_hidden_layers=6, n_routed_experts=24, vocab_size=32768)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    path = tmp_path_factory.mktemp("memory") / "model"
    save(model, path, max_shard_bytes=200 << 20)
    return path


def _measure(folder: Path, dtype: str, job: str) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURE, str(folder), dtype, job]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("dtype", "job"), [("float32", "save"), ("bfloat16", "save"), ("stored", "run"), ("fp8", "save")]
)
def test_peak(folder: Path, tmp_path: Path, dtype: str, job: str) -> None:
    copy = tmp_path / "model"
    copy.symlink_to(folder)  # what the process writes lies beside it and goes with tmp_path
    found = _measure(copy, dtype, job)
    print(
        f"{dtype} {job}: {found['size'] / 2**20:.0f} MiB, load {found['load']:.3f}x, all {found['all']:.3f}x"
    )
    assert found["size"] > (300 << 20) / (2 if dtype in ("bfloat16", "fp8") else 1)
    assert 0.9 < found["load"] < 1.3, found
    assert found["all"] < 1.3, found
    if job == "run":
        run.verify(tmp_path / "model.run" / "step-000001")


def test_peak_of_a_conversion(folder: Path, tmp_path: Path) -> None:
    """4 MiB a worker and 4 KB a tensor, and what threads and allocators keep: 30 MiB when this was written.

    The largest tensor alone has 64 MiB, the files 320.
    """
    copy = tmp_path / "model"
    copy.symlink_to(folder)
    found = _measure(copy, "", "convert")
    print({key: f"{value / 2**20:.0f} MiB" for key, value in found.items()})
    assert max(found.values()) < 48 * 2**20, found
