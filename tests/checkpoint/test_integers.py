"""Folders in INT8 and INT4: the layout, mapped tensors, kills, and every refusal."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.checkpoint import fp8, hf, integers
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.errors import CheckpointError
from dsv3.checkpoint.hf import load, save
from dsv3.checkpoint.init import init
from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.ops.integers import quantise_int4, quantise_int8
from dsv3.quant.packed import Integers, PackedLinear, matrices, pack
from tests.checkpoint.conftest import random_model, same

# Edges everywhere: 160 and 136 are no multiples of 64 or 128, 144 is none of 32.
SIZES = dict(hidden_size=160, intermediate_size=144, num_hidden_layers=2, moe_intermediate_size=136)
INDEX = "model.safetensors.index.json"
FORMS = [("int8", None), ("int4", None), ("int4", 32)]
IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """A warning that no test expects is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in three formats, each in several files; a tokenizer beside the BF16 one."""
    path = tmp_path_factory.mktemp("integers")
    model = random_model(**SIZES)
    save(model, path / "fp32", max_shard_bytes=400_000)
    save(model, path / "bf16", dtype="bfloat16", max_shard_bytes=150_000)
    save(model, path / "fp8", fp8=True, dtype="bfloat16", max_shard_bytes=150_000)
    (path / "bf16" / "tokenizer.json").write_text("{}")
    return {name: path / name for name in ("fp32", "bf16", "fp8")}


@pytest.fixture(scope="module")
def made(sources: dict[str, Path]) -> dict[str, Path]:
    """The BF16 folder in INT8 and INT4."""
    for to in ("int8", "int4"):
        convert(sources["bf16"], sources["bf16"].parent / to, to)
    return {to: sources["bf16"].parent / to for to in ("int8", "int4")}


def _read(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _edit_config(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, **changes}))


@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(("to", "group"), FORMS)
def test_what_a_folder_holds(
    sources: dict[str, Path], tmp_path: Path, stored: str, to: str, group: int | None
) -> None:
    """Every tensor from the source's own values, quantised whole by the definition."""
    convert(sources[stored], tmp_path / "x", to, group=group)
    found, dense = _read(tmp_path / "x"), load(sources[stored], dtype="float32")
    exact = dict(dense.state_dict())  # in FP32: FP8 is dequantised, never rounded to BF16 on the way
    paths = {path for path, _ in matrices(dense)}
    wanted: dict[str, Tensor] = {}
    for name, tensor in exact.items():
        path = name.removesuffix(".weight")
        if path not in paths:
            kept = torch.float32 if stored == "fp32" or name.endswith("bias") else torch.bfloat16
            wanted[name] = tensor.to(torch.bfloat16 if "embed_tokens" in name else kept)
        elif to == "int8" or name in ("lm_head.weight",) or "kv_b_proj" in name:
            q8 = quantise_int8(tensor)
            wanted |= {name: q8.values, f"{name}_scale": q8.scales}
        else:
            q4 = quantise_int4(tensor, group or 128)
            wanted |= {name: q4.values, f"{name}_scale": q4.scales, f"{name}_least": q4.leasts}
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    experts = found["model.layers.1.mlp.experts.gate_proj.weight"]
    assert experts.shape == ((8, 9, 40, 16, 4) if to == "int8" else (8, 9, 20, 16, 4))
    tree = json.loads((tmp_path / "x" / "config.json").read_text())
    assert tree["model_type"] == "dsv3_packed"
    said = {"quant_method": "dsv3", "layout": 2, "bits": int(to[3:])}
    assert tree["quantization_config"] == (said if to == "int8" else {**said, "group_size": group or 128})
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    layers = {name: re.match(r"model\.layers\.(\d)\.", name) for name in found}
    files = {file: {m and m[1] for n, m in layers.items() if index["weight_map"][n] == file} for file in
             set(index["weight_map"].values())}  # fmt: skip
    assert all(len(held) == 1 for held in files.values()) and len(files) == 5  # embedding, 2 + MTP, head
    assert (tmp_path / "x" / "tokenizer.json").exists() == (stored == "bf16")


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_converted_folder_is_the_model_quantised_at_load(
    sources: dict[str, Path], made: dict[str, Path], to: str
) -> None:
    mapped, asked = load(made[to]), load(made[to], quantize=to)
    quantised, packed = load(sources["bf16"], quantize=to), load(sources["bf16"])
    pack(packed, Integers(int(to[3:])))
    assert same(mapped, asked) and same(mapped, quantised) and same(mapped, packed)
    assert mapped.config == load(sources["bf16"]).config
    outputs = [model(IDS) for model in (mapped, quantised, packed)]
    for output in outputs:
        assert output.logits_BTV.dtype == torch.float32 and not output.logits_BTV.requires_grad
        assert torch.equal(output.logits_BTV, outputs[0].logits_BTV)
        assert torch.equal(output.mtp_logits[0], outputs[0].mtp_logits[0])
    assert load(made[to], dtype="bfloat16")(IDS).logits_BTV.dtype == torch.bfloat16


def test_tensors_are_the_files_own_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    """Mapped: what is written to a file afterwards is seen, what is written to a tensor stays out of it."""
    folder = Path(shutil.copytree(made["int8"], tmp_path / "x"))
    model, name = load(folder), "model.layers.1.mlp.experts.up_proj.weight"
    tensor = model.get_buffer(name)
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    with integers.Weights(folder) as weights:
        start = weights.entries[name].start
    before = file.read_bytes()
    with open(file, "r+b") as stream:
        stream.seek(start)
        stream.write(bytes([77]))
    assert tensor.view(-1)[0] == 77
    tensor.view(-1)[1] = 55
    assert file.read_bytes()[start + 1] == before[start + 1]
    assert tensor.view(-1)[1] == 55
    aligned = [t.data_ptr() % t.element_size() for t in model.state_dict().values()]
    assert set(aligned) == {0}


MEASURE = """
import re, sys, time
from pathlib import Path
import torch
from dsv3.checkpoint.hf import load
def resident(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
load(sys.argv[2])  # what is imported on the way
base = resident("VmRSS")
started = time.perf_counter()
model = load(sys.argv[1])
took = time.perf_counter() - started
size = sum(tensor.nbytes for tensor in model.state_dict().values())
print(size, resident("VmRSS") - base, took)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_no_memory(made: dict[str, Path], tmp_path: Path) -> None:
    config = ModelConfig.preset("small", num_hidden_layers=6, n_routed_experts=48)
    init(config, tmp_path / "large", "int8")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(made["int8"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, resident, took = map(float, done.stdout.split())
    print(f"{size / 2**20:.0f} MiB, {resident / 2**20:.1f} MiB resident, {took:.2f} s")
    assert size > 100 * 2**20 and resident < 0.1 * size and took < 5


@pytest.mark.parametrize(("workers", "band"), [(1, 1), (5, 1), (3, 30_000)])
def test_bytes_do_not_depend_on_the_way(
    sources: dict[str, Path], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    workers: int, band: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(fp8, "BAND", band)
    convert(sources["bf16"], tmp_path / "a", "int4", workers=workers)
    assert _files(tmp_path / "a") == _files(made["int4"])


SLOW = """
import os, sys, time
from dsv3.checkpoint.convert import convert
sync = os.fsync
def slow(descriptor):
    time.sleep(0.1)
    sync(descriptor)
os.fsync = slow
convert(*sys.argv[1:3], "int4", workers=2)
"""


def test_killed_and_continued(sources: dict[str, Path], made: dict[str, Path], tmp_path: Path) -> None:
    journal = tmp_path / ".tmp-convert-x" / "journal.json"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(sources["bf16"]), str(tmp_path / "x")])
    until = time.monotonic() + 60
    done: list[str] = []
    while not done and time.monotonic() < until:
        time.sleep(0.005)
        if journal.exists():
            done = list(json.loads(journal.read_text())["done"])
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert done and not (tmp_path / "x").exists()
    work = tmp_path / ".tmp-convert-x" / "model"
    before = {file: (work / file).stat().st_mtime_ns for file in done}
    result = convert(sources["bf16"], tmp_path / "x", "int4")
    assert _files(tmp_path / "x") == _files(made["int4"])
    assert {file: (tmp_path / "x" / file).stat().st_mtime_ns for file in done} == before
    assert result.read_bytes < sum(tensor.nbytes for tensor in _read(sources["bf16"]).values())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_another_group_starts_again(
    sources: dict[str, Path], made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted(made["int4"].glob("*.safetensors"))[0]
    tasks = integers.plan

    def failing(*arguments: Any) -> Any:  # fmt: skip
        shards = tasks(*arguments)
        shards[2].tasks[0] = integers.Task(lambda put: (_ for _ in ()).throw(KeyboardInterrupt()))
        return shards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "plan", failing)
        with pytest.raises(KeyboardInterrupt):
            convert(sources["bf16"], tmp_path / "x", "int4", workers=1, group=32)
    assert (tmp_path / ".tmp-convert-x" / "model" / shard.name).exists()
    convert(sources["bf16"], tmp_path / "x", "int4")
    assert "starting again" in capsys.readouterr().err
    assert _files(tmp_path / "x") == _files(made["int4"])


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"to": "int5"}, r"--to \(int5\) is unknown"),
        ({"to": "int4", "group": 48}, r"--group \(48\) must be one of 32, 64, 128"),
        ({"to": "int8", "group": 32}, r"--group \(32\) is for int4"),
        ({"to": "fp8", "group": 32}, r"--group \(32\) is for int4"),
        ({"to": "int8", "scale_format": "ue8m0"}, "is for --to fp8"),
    ],
    ids=str,
)
def test_what_makes_no_sense(
    sources: dict[str, Path], tmp_path: Path, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        convert(sources["bf16"], tmp_path / "x", **arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["int8", "int4", "bf16", "fp32", "fp8"])
def test_nothing_is_made_from_integers(made: dict[str, Path], tmp_path: Path, to: str) -> None:
    for folder in made.values():
        with pytest.raises(UserError, match=rf"{folder.name} is in {folder.name}, .* convert the original"):
            convert(folder, tmp_path / "x", to)
    assert not list(tmp_path.iterdir())


def test_what_loads_and_what_not(made: dict[str, Path], tmp_path: Path) -> None:
    for to, other in (("int8", "int4"), ("int4", "fp8"), ("int4", "int8")):
        with pytest.raises(UserError, match=rf"is {to}, quantize \('{other}'\) needs what that lost"):
            load(made[to], quantize=other)
    model = load(made["int8"])
    with pytest.raises(UserError, match="a packed model is not saved"):
        save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def _edited(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder as one file, changed."""
    tensors = _read(folder)
    change(tensors)
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", to)
    return to


def test_a_folder_in_one_file_rewritten_by_the_library(made: dict[str, Path], tmp_path: Path) -> None:
    again = _edited(made["int4"], tmp_path / "a", lambda tensors: None)
    assert same(load(again), load(made["int4"]))


def _change(name: str, how: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: how(tensors[name])})


SCALE = "model.layers.1.mlp.experts.up_proj.weight_scale"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(SCALE), rf"1 missing \({SCALE}\)"),
        (lambda t: t.update(more=torch.zeros(1)), r"1 unexpected \(more\)"),
        (_change(SCALE, lambda x: x[:, :, :1].clone()), r"_scale is \[8, 9, 1, 16\], .* \[8, 9, 2, 16\]"),
        (_change(SCALE, Tensor.half), r"weight_scale \(torch.float16\) have another number format"),
        (_change("lm_head.weight", lambda x: x.view(torch.int8)), r"lm_head.weight \(torch.int8\)"),
        (_change("model.norm.weight", Tensor.int), r"model.norm.weight \(torch.int32\)"),
    ],
)
def test_tensors_that_are_not_the_models(
    made: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        load(_edited(made["int4"], tmp_path / "a", change))


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"quant_method": "dsv3", "bits": 3}, "needs bits 8 or 4"),
        ({"quant_method": "dsv3", "bits": 4, "group_size": 48}, "group_size 32, 64 or 128"),
        ({"quant_method": "dsv3", "layout": 2, "bits": 4, "group_size": 32}, "misshapen"),
        ({"quant_method": "dsv3", "layout": 2, "bits": 8}, "unexpected"),
        (
            {"quant_method": "dsv3", "bits": 4, "group_size": 128},
            "layout 1, .* reads 2; convert",
        ),
        ({"quant_method": "awq", "bits": 4}, "is not supported"),
        (None, "unexpected"),
    ],
    ids=str,
)
def test_a_configuration_that_lies(made: dict[str, Path], tmp_path: Path, facts: Any, says: str) -> None:
    folder = _edited(made["int4"], tmp_path / "a", lambda tensors: None)
    _edit_config(folder, quantization_config=facts)
    with pytest.raises(UserError, match=says) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_damage(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["int4"], tmp_path / "a"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        load(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"shard {shard.name} is missing"):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_no_integer_can_hold(tmp_path: Path, bad: float) -> None:
    model = random_model(**SIZES)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.up_proj.weight[5, 100, 7] = bad
    save(model, tmp_path / "a")
    for to in ("int8", "int4"):
        said = rf"experts\.5\.up_proj\.weight cannot be written in {to.upper()}"
        with pytest.raises(CheckpointError, match=said):
            convert(tmp_path / "a", tmp_path / "b", to)
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / "a", quantize=to)
    assert not (tmp_path / "b").exists()


def test_an_mtp_layers_own_copy_is_left_behind_with_a_warning(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = _edited(
        sources["bf16"], tmp_path / "a", lambda t: t["model.layers.2.embed_tokens.weight"].add_(1)
    )
    warned = r"a: model\.layers\.2\.embed_tokens\.weight differ"
    with pytest.warns(UserWarning, match=warned):
        model = load(folder, quantize="int8")
    with pytest.warns(UserWarning, match=warned):
        convert(folder, tmp_path / "b", "int8")
    assert same(load(tmp_path / "b"), model)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert hf.stored_integers(folder) is None


def test_transformers_refuses_clearly(made: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="model type `dsv3_packed` but Transformers does not recognize"):
        transformers.AutoModelForCausalLM.from_pretrained(made["int8"])
