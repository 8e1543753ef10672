"""What stages share: a model that begins from a folder, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsv3
from dsv3.checkpoint.convert import convert
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.model import ModelConfig
from dsv3.config.train import PretrainRecipe
from dsv3.model import DeepSeekV3
from dsv3.train.pretrain import pretrain
from dsv3.train.stage import make_model
from tests.train.conftest import MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "model"
    dsv3.save(DeepSeekV3(ModelConfig(**MODEL), seed=7), path)
    return path


def tree_of(recipe: PretrainRecipe, **changes: object) -> dict:
    tree = recipe.model_dump(mode="json")
    del tree["model"]
    return {**tree, **changes}


def test_start_gives_the_weights_and_the_model(make_recipe, folder: Path) -> None:
    tree = tree_of(make_recipe(), start=str(folder), model={"aux_loss_alpha": 0.0})
    recipe = recipes.validate(PretrainRecipe, tree)
    assert recipe.model.hidden_size == MODEL["hidden_size"] and recipe.model.aux_loss_alpha == 0
    made, wanted = make_model(recipe, torch.device("cpu")).state_dict(), dsv3.load(folder).state_dict()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    again = recipes.validate(PretrainRecipe, recipe.model_dump(mode="json"))  # OUT/recipe.yaml, to resume
    assert again == recipe


def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(make_recipe, folder: Path) -> None:
    tree = tree_of(make_recipe(), start=str(folder), model={"hidden_size": 48})
    recipe = recipes.validate(PretrainRecipe, tree)
    with pytest.raises(UserError, match="misshapen"):
        pretrain(recipe)
    assert not Path(recipe.out).exists()
    with pytest.raises(UserError, match="does not exist"):
        recipes.validate(PretrainRecipe, {**tree, "start": str(folder / "nowhere")})


def test_a_start_in_integers_is_refused(make_recipe, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "int8", "int8")
    with pytest.raises(UserError, match=r"start \(.*int8\) is int8, which cannot be trained"):
        pretrain(
            recipes.validate(PretrainRecipe, tree_of(make_recipe(), start=str(tmp_path / "int8"), model={}))
        )


def test_schedules_in_tokens_need_a_length_known_beforehand(make_recipe) -> None:
    pieces = [{"until": 1000, "to": 1}]
    schedule = {"measure": "tokens", "learning_rate": pieces, "batch": pieces, "gamma": pieces, "mtp": pieces}
    with pytest.raises(UserError, match="before the run's end"):
        make_recipe(schedule=schedule)
