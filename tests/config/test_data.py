from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv3.common.errors import UserError
from dsv3.config.data import DataRecipe, ManifestConfig
from dsv3.config.recipe import keys, load, validate

RECIPES = Path(__file__).parents[2] / "recipes"


def test_every_key_says_what_it_means() -> None:
    for cls in (DataRecipe, ManifestConfig):
        assert all(len(description) > 10 for _, description, _ in keys(cls).values())


def test_shipped_recipes_load() -> None:
    tiny = load(DataRecipe, RECIPES / "data-tiny.yaml", ["--valid_fraction", "0.05", "--out=x"])
    assert [source.kind for source in tiny.sources] == ["stdlib", "manifest"]
    assert (tiny.valid_fraction, tiny.out, tiny.fim_rate) == (0.05, "x", 0.1)
    for path in RECIPES.glob("manifest-*.yaml"):
        assert load(ManifestConfig, path).packages


def test_the_shipped_recipe_names_every_key() -> None:
    text = (RECIPES / "data-tiny.yaml").read_text()
    missing = [key for key in keys(DataRecipe) if f"{key.split('.')[-1]}:" not in text]
    assert missing == ["sources.suffixes"]


A = {"name": "a", "stdlib": True}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sources": [A]}, "out is required"),
        ({"out": "o", "sources": []}, "sources"),
        ({"out": "o", "sources": [A | {"weight": 0}]}, r"sources\.0\.weight \(0\): .* greater than 0"),
        ({"out": "o", "sources": [A | {"paths": ["x"]}]}, r"exactly one of .* \(found paths and stdlib\)"),
        ({"out": "o", "sources": [{"name": "a"}]}, r"source a needs exactly one of .* \(found none\)"),
        ({"out": "o", "sources": [{"name": "a", "manifest": "m"}]}, "manifest and folder go together"),
        ({"out": "o", "sources": [A, A]}, "the name a appears 2 times"),
        ({"out": "o", "sources": [A | {"name": "../a"}]}, "becomes a folder"),
        ({"out": "o", "sources": [A], "fim_rat": 1}, r"unknown key fim_rat \(did you mean fim_rate\?\)"),
        ({"out": "o", "sources": [A], "fim_rate": 1.5}, "fim_rate"),
        ({"out": "o", "sources": [A], "valid_fraction": 1}, "valid_fraction"),
        ({"out": "o", "sources": [A], "tokenizer": {"vocab_size": 100}}, r"tokenizer\.vocab_size \(100\)"),
    ],
)
def test_refusals(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        validate(DataRecipe, tree)
    assert "\n" not in str(caught.value)
