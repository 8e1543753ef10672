"""The extension's recipes: the report's figures, what a phase inherits, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.data import DataRecipe
from dsv3.config.extend import ExtendRecipe
from dsv3.config.model import ModelConfig
from dsv3.config.train import PretrainRecipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def start(tmp_path: Path) -> str:
    """A folder with a config.json."""
    config = ModelConfig.preset("v3-671b", rope_scaling=None, max_position_embeddings=4096)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return str(tmp_path)


def tree(folder: str, **changes: Any) -> dict[str, Any]:
    phase = {"sequence_length": 8192, "steps": 5, "batch": {"sequences": 4, "micro_sequences": 2}}
    return {
        "start": folder,
        "model": {"max_position_embeddings": 163840, "rope_scaling": {"factor": 40}},
        "phases": [phase, {**phase, "sequence_length": 16384, "optimizer": {"lr": 1e-6}}],
        **changes,
    }


def test_the_recipe_of_the_671b_model_states_the_reports_phases(start: str) -> None:
    recipe = recipes.load(ExtendRecipe, RECIPES / "extend-v3-671b.yaml", ["--start", start])
    said = [(p.sequence_length, p.batch.sequences, p.steps, p.optimizer.lr) for p in recipe.phases]
    assert said == [(32768, 1920, 1000, 7.3e-6), (131072, 480, 1000, 7.3e-6)]
    for phase in recipe.phases:
        released = ModelConfig.preset("v3-671b")  # YaRN with s = 40 in both phases
        assert phase.model.rope_scaling == released.rope_scaling
        assert phase.model.max_position_embeddings == released.max_position_embeddings
        assert phase.total_tokens == 1000 * 1920 * 32768


def test_the_tiny_recipe_scales_every_length_by_16(start: str) -> None:
    tiny = recipes.load(ExtendRecipe, RECIPES / "extend-tiny.yaml", ["--start", start])
    real = recipes.load(ExtendRecipe, RECIPES / "extend-v3-671b.yaml", ["--start", start])
    for small, large in zip(tiny.phases, real.phases, strict=True):
        assert large.sequence_length == 16 * small.sequence_length
        assert large.model.max_position_embeddings == 16 * small.model.max_position_embeddings
        assert small.model.rope_scaling is not None and large.model.rope_scaling is not None
        change = {"original_max_position_embeddings": 4096}
        assert small.model.rope_scaling.model_copy(update=change) == large.model.rope_scaling
    tokens = [phase.batch.sequences * phase.sequence_length for phase in tiny.phases]
    assert tokens[0] == tokens[1]


def test_a_phase_has_the_common_keys_and_its_own(start: str) -> None:
    recipe = recipes.validate(
        ExtendRecipe, tree(start, out="runs/x", seed=7, optimizer={"lr": 1e-5, "clip": 2})
    )
    one, two = recipe.phases
    assert (one.out, two.out) == ("runs/x/phase-1", "runs/x/phase-2")
    assert (one.start, two.start) == (start, "runs/x/phase-1/model")
    assert (one.optimizer.lr, two.optimizer.lr, two.optimizer.clip) == (1e-5, 1e-6, 2)
    assert one.seed == two.seed == 7
    assert one.model == two.model and one.model.hidden_size == 7168
    assert (one.total_tokens, two.total_tokens) == (5 * 4 * 8192, 5 * 4 * 16384)


def test_what_is_dumped_reads_back(start: str, tmp_path: Path) -> None:
    recipe = recipes.validate(ExtendRecipe, tree(start))
    (tmp_path / "again.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(ExtendRecipe, tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start": None}, "start is required"),
        ({"phases": []}, "phases"),
        ({"phases": 3}, r"phases \(3\) must be a list"),
        ({"model": {"max_position_embeddings": 163840}}, "model.rope_scaling is required"),
        ({"model": {"rope_scaling": {"factor": 40}}}, r"sequence_length \(8192\) exceeds"),
        ({"optimiser": {}}, r"phases.0: unknown key optimiser \(did you mean optimizer"),
        ({"schedule": {"batch": [{"until": 1, "to": 0.5}]}}, "a phase has one batch size"),
    ],
)
def test_mistakes_are_named(start: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipes.validate(ExtendRecipe, tree(start, **changes))


def test_phases_must_grow(start: str) -> None:
    phases = tree(start)["phases"]
    with pytest.raises(UserError, match=r"must rise from phase to phase, but reads \[16384, 8192\]"):
        recipes.validate(ExtendRecipe, tree(start, phases=phases[::-1]))
    phases[0]["sequence_length"] = 4096
    with pytest.raises(UserError, match=r"\(4096\) must exceed .*original_max_position_embeddings \(4096\)"):
        recipes.validate(ExtendRecipe, tree(start, phases=phases))
    del phases[0]["steps"]
    with pytest.raises(UserError, match="steps"):
        recipes.validate(ExtendRecipe, tree(start, phases=phases))


@pytest.mark.parametrize("name", ["needle-extend", "extend-tiny"])
def test_the_other_recipes_are_sound(start: str, name: str) -> None:
    recipe = recipes.load(ExtendRecipe, RECIPES / f"{name}.yaml", ["--start", start])
    assert [phase.sequence_length for phase in recipe.phases] == [2048, 8192]


def test_the_needle_recipes_fit_one_another() -> None:
    short, long = (recipes.load(DataRecipe, RECIPES / f"needle-data{end}.yaml") for end in ("", "-long"))
    train = recipes.load(PretrainRecipe, RECIPES / "needle-tiny.yaml")
    assert long.tokenizer.path == short.out == train.data.path
    tree = yaml.safe_load((RECIPES / "needle-extend.yaml").read_text())
    assert tree["start"] == f"{train.out}/model" and tree["data"]["path"] == long.out
    yarn = tree["model"]["rope_scaling"]
    assert yarn["original_max_position_embeddings"] == train.sequence_length
    assert train.model.rope_theta * 16 == ModelConfig.preset("v3-671b").rope_theta
