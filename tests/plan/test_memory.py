"""Memory: bytes of every format against packed models and files; room, machines and bounds by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.hf import save
from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from dsv3.plan import memory
from dsv3.plan.cost import report_run
from dsv3.plan.hardware import HARDWARE
from dsv3.plan.memory import Serving, footprint, train_bytes, weight_bytes
from dsv3.plan.params import counts
from dsv3.quant.packed import Integers, pack
from tests.model.build import tiny_config

V3 = ModelConfig.preset("v3-671b")


@pytest.mark.parametrize("kind, group", [("int8", 128), ("int4", 32), ("int4", 128)])
def test_integers_against_a_packed_model(kind: str, group: int) -> None:
    config = tiny_config(num_nextn_predict_layers=1)
    model = DeepSeekV3(config).to(torch.bfloat16)
    pack(model, Integers(int(kind[3:]), group))
    tensors = (*model.parameters(), *model.buffers())
    assert sum(weight_bytes(config, kind, group).values()) == sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_released_formats_against_files(kind: str, tmp_path: Path) -> None:
    """What we save: every tensor once, but MTP's embedding and head, which the files repeat."""
    config = tiny_config(num_nextn_predict_layers=1)
    save(DeepSeekV3(config).to(torch.bfloat16), tmp_path / "model", fp8=kind == "fp8")
    size = 0
    for path in tmp_path.glob("model/*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__" and not name.endswith(
                ("layers.3.embed_tokens.weight", "shared_head.head.weight")
            ):
                size += entry["data_offsets"][1] - entry["data_offsets"][0]
    assert sum(weight_bytes(config, kind).values()) == size


def test_the_released_model() -> None:
    """Gigabytes by format; BF16 is two bytes a parameter, FP8 one but for what stays BF16."""
    sizes = {kind: sum(weight_bytes(V3, kind).values()) / 1e9 for kind in memory.FORMATS}
    assert sizes["bf16"] == pytest.approx(2 * counts(V3).trained / 1e9, rel=1e-4)
    assert sizes["fp8"] == pytest.approx(684.87, abs=0.01)  # 689 GB of files: embedding, head twice
    assert sizes["int8"] == pytest.approx(684.37, abs=0.01)
    assert sizes["int4"] == pytest.approx(386.34, abs=0.01)  # 4.5 bits a number
    assert memory.cache_bytes(V3) == 70_272
    assert memory.cache_bytes(V3, "fp8") == 61 * 656
    assert memory.cache_bytes(V3, mtp=True) == 62 * 1152


def test_which_machines_hold_it() -> None:
    """FP8 on 8 H200 yes, on 8 H100 no; INT4 on 4 H100 no, on a PC with 384 GB yes, just."""

    def needs(kind: str, name: str) -> int:
        return memory.devices(footprint(Serving(V3, kind)), HARDWARE[name], 0.1)

    assert 4 < needs("fp8", "h200") <= 8 < needs("fp8", "h100") <= 16
    assert 4 < needs("int4", "h100") <= 8
    assert 16 < needs("bf16", "h100") <= 24 and needs("bf16", "h200") <= 16
    assert needs("int4", "pc-384") == needs("fp8", "server-768") == 1 < needs("fp8", "pc-384")


def test_room_is_what_is_left() -> None:
    found = footprint(Serving(V3, "fp8", context=1000, sequences=3))
    machine = HARDWARE["h200"]
    tokens = memory.room(found, machine, 8, 0.1)
    assert found.weights + tokens * 70_272 == pytest.approx(8 * 141e9 * 0.9)
    assert found.cache == 3000 * 70_272
    assert memory.room(found, machine, 2, 0.1) < 0


def test_decode_bound_by_hand() -> None:
    """A sequence reads the activated weights and its cache; with MTP the module, and two tokens' experts."""
    machine = HARDWARE["h200"]
    serving = Serving(V3, "bf16", context=5000)
    found = footprint(serving)
    active = 2 * counts(V3).activated + 4 * 58 * 256  # the biases are FP32
    step = active + 5000 * 70_272
    bound = memory.decode_bound(serving, found, machine, 16)
    assert bound == pytest.approx(16 * 4.8e12 / step, rel=1e-6)

    drafting = Serving(V3, "bf16", context=5000, mtp=True, acceptance=0.8)
    with_module = footprint(drafting)
    distinct = 256 * (1 - (1 - 8 / 256) ** 2)
    expert = 2 * 3 * 7168 * 2048
    routed = 58 * expert * (distinct - 8)
    module = with_module.parts["MTP"] - expert * (256 - distinct) + with_module.parts["head"]
    step = active + routed + module + 5000 * 62 * 1152
    fast = memory.decode_bound(drafting, with_module, machine, 16)
    assert fast == pytest.approx(1.8 * 16 * 4.8e12 / step, rel=1e-6)
    # a batch shares what it reads: less a sequence, more together
    eight = Serving(V3, "bf16", context=5000, sequences=8)
    slower = memory.decode_bound(eight, footprint(eight), machine, 16)
    assert bound / 8 < slower < bound


def test_training_in_the_reports_layout() -> None:
    """2,048 H800 of 80 GB hold it, as they did; each part by hand where it is simple."""
    run = report_run()
    parts = train_bytes(run)
    assert 60e9 < sum(parts.values()) < 80e9
    assert parts["logits"] == 2 * 4 * 4096 * 129280
    routed = 58 * 256 * 3 * 7168 * 2048 / 16 / 64
    assert parts["gradients"] > 4 * 2 * routed
    wide = train_bytes(
        type(run)(run.config, run.layout, run.machine, run.seq_len, run.batch, "bf16", run.mtp)
    )
    assert wide["activations"] > parts["activations"] and wide["weights"] > 1.4 * parts["weights"]
    assert wide["optimizer"] == parts["optimizer"]


def test_summary_names_units_and_follows_the_model() -> None:
    found = memory.summary(Serving(tiny_config(), "int8"))
    assert {"weight_bytes", "cache_bytes_per_token", "machines_needed", "setups"} <= set(found)
    first = found["setups"][0]
    assert first["decode_bound_tokens_per_s_per_sequence"] > 0
    assert first["decode_bound_mtp_tokens_per_s_per_sequence"] is None  # no MTP module to draft with


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(context=0), r"context \(0\)"),
        (dict(reserve=1.0), r"reserve \(1.0\)"),
        (dict(acceptance=1.1), r"acceptance \(1.1\)"),
        (dict(mtp=True), "no MTP module"),
        (dict(weights="fp9"), "did you mean fp8"),
        (dict(cache="int8"), r"cache \(int8\)"),
        (dict(weights="int4", group=16), r"group \(16\)"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        footprint(Serving(tiny_config(), **changes))
