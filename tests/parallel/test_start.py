"""``start`` on many processes: every rank reads what it updates of a Hugging Face folder, FP8 or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dsv3
from dsv3.config.model import ModelConfig
from tests.parallel.layouts import tree
from tests.parallel.ranks import run_ranks
from tests.parallel.test_faults import losses
from tests.train.conftest import MODEL, prepare_words

LAYOUTS: dict[str, dict[str, Any]] = {
    "expert": {"expert": 2},
    "shards": {"expert": 2, "zero": 3},
    "pipeline": {"pipeline": 2, "schedule": "1f1b"},
}


def train(runs: list[dict[str, Any]]) -> list[int]:
    """In a rank: short runs, and the bytes of weights that each one read."""
    from dsv3.checkpoint.safetensors_io import SafetensorsFile
    from dsv3.config import recipe as recipes
    from dsv3.config.train import PretrainRecipe
    from dsv3.train.pretrain import pretrain

    read, plain = [0], SafetensorsFile.part

    def part(self: SafetensorsFile, name: str, first: int, count: int) -> Any:
        found = plain(self, name, first, count)
        read[-1] += found.nbytes
        return found

    SafetensorsFile.part = part  # type: ignore[method-assign]
    for run in runs:
        pretrain(recipes.validate(PretrainRecipe, run))
        read.append(0)
    return read[:-1]


@pytest.mark.slow
def test_ranks_begin_from_a_folder(tmp_path: Path) -> None:
    data = prepare_words(tmp_path)
    config = ModelConfig.from_dict({**MODEL, "num_hidden_layers": 4, "intermediate_size": 320})
    model = dsv3.DeepSeekV3(config, seed=3)
    for moe in model.moe_layers().values():
        moe.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    runs: dict[str, dict[str, Any]] = {}
    for kind in ("plain", "fp8"):
        dsv3.save(model, tmp_path / kind, fp8=kind == "fp8")
        for name, parallel in {"one": {}, **LAYOUTS}.items():
            changes = {"start": str(tmp_path / kind), "model": {}, "parallel": parallel}
            runs[f"{kind}-{name}"] = tree(str(data), str(tmp_path / f"{kind}-{name}"), 2, changes)
            runs[f"{kind}-{name}"]["model"] = {}
    function = "tests.parallel.test_start:train"
    run_ranks(0, function, [run for name, run in runs.items() if name.endswith("one")])
    many = [name for name in runs if not name.endswith("one")]
    read = run_ranks(2, function, [runs[name] for name in many])
    for kind in ("plain", "fp8"):
        size = sum(file.stat().st_size for file in (tmp_path / kind).glob("*.safetensors"))
        wanted = losses(tmp_path / f"{kind}-one")
        for name in LAYOUTS:
            found = losses(tmp_path / f"{kind}-{name}")
            assert list(found) == [1, 2]
            for step, loss in found.items():
                assert loss == pytest.approx(wanted[step], rel=1e-5), name
            for rank in read:
                assert 0.2 * size < rank[many.index(f"{kind}-{name}")] < 0.8 * size, name
