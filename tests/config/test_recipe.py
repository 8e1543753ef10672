"""Recipes: YAML, dotted overrides, and refusals with the full dotted key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import Field, model_validator

from dsv3.common.errors import UserError
from dsv3.config.data import DataRecipe, ManifestConfig
from dsv3.config.recipe import VERBS, Recipe, dump, keys, load, parse_overrides, parse_value, validate


class Optimizer(Recipe):
    shorthand: ClassVar[dict[str, str]] = {"size": "big or small"}

    lr: float = Field(1e-3, gt=0, description="learning rate")
    betas: list[float] = Field([0.9, 0.95], description="decay of the moments")
    fused: bool | None = Field(None, description="one kernel for all parameters; null: where it can")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> dict[str, Any]:
        if "size" not in tree:
            return tree
        rest = {key: value for key, value in tree.items() if key != "size"}
        return {"lr": {"big": 1.0, "small": 0.1}[tree["size"]], **rest}

    @model_validator(mode="after")
    def _check(self) -> Optimizer:
        if len(self.betas) != 2:
            raise ValueError(f"optimizer.betas ({self.betas}) must be two numbers")
        return self


class Run(Recipe):
    out: str = Field(description="folder of the run")
    steps: int = Field(10, ge=1, description="optimizer steps")
    optimizer: Optimizer = Optimizer()
    teacher: Optimizer | None = Field(None, description="another section, absent by default")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_and_override(tmp_path: Path) -> None:
    path = written(tmp_path, "out: runs/a\noptimizer:\n  lr: 3e-4\n")
    run = load(Run, path)
    assert run.optimizer.lr == 3e-4 and run.steps == 10  # 3e-4 is a number, unlike in YAML 1.1
    run = load(Run, path, ["--steps", "7", "--optimizer.lr=1E-5", "--optimizer.fused", "--out", "b"])
    assert (run.steps, run.optimizer.lr, run.optimizer.fused, run.out) == (7, 1e-5, True, "b")
    run = load(Run, path, ["--optimizer.betas", "[0.8, 0.9]", "--teacher.lr", "2"])
    assert run.optimizer.betas == [0.8, 0.9] and run.teacher is not None and run.teacher.lr == 2
    assert run.optimizer.lr == 3e-4  # its neighbours stay


def test_an_override_may_fill_an_empty_section(tmp_path: Path) -> None:
    assert load(Run, written(tmp_path, "out: a\noptimizer:\n"), ["--optimizer.lr", "5"]).optimizer.lr == 5
    assert load(Run, written(tmp_path, ""), ["--out", "a"]).out == "a"


def test_a_section_given_in_part_keeps_the_recipes_defaults() -> None:
    class Gentle(Run):
        optimizer: Optimizer = Optimizer(lr=1e-6)

    assert validate(Gentle, {"out": "x", "optimizer": {"fused": True}}).optimizer == Optimizer(
        lr=1e-6, fused=True
    )
    assert validate(Gentle, {"out": "x", "optimizer": {"lr": 2.0}}).optimizer.lr == 2
    assert validate(Run, {"out": "x", "optimizer": {"fused": True}}).optimizer.lr == 1e-3
    assert (keys(Gentle)["optimizer.lr"][2], keys(Run)["optimizer.lr"][2]) == (1e-6, 1e-3)


def test_shorthand(tmp_path: Path) -> None:
    path = written(tmp_path, "out: a\noptimizer: {size: small}\n")
    assert load(Run, path).optimizer.lr == 0.1
    assert load(Run, path, ["--optimizer.size", "big"]).optimizer.lr == 1.0
    assert load(Run, path, ["--optimizer.lr", "9"]).optimizer.lr == 9  # what is said beats the shorthand
    assert keys(Run)["optimizer.size"] == ("str", "big or small", None)


@pytest.mark.parametrize(
    "text, overrides, said",
    [
        ("{}", [], "out is required: set it in the recipe or with --out VALUE"),
        ("out: a\nstep: 3", [], "unknown key step (did you mean steps?)"),
        ("out: a\noptimizer: {learning: 3}", [], "unknown key optimizer.learning"),
        ("out: a", ["--optimizer.lrr", "3"], "unknown key optimizer.lrr (did you mean optimizer.lr?)"),
        ("out: a", ["--teacher.betaz", "3"], "unknown key teacher.betaz (did you mean teacher.betas?)"),
        ("out: a\nsteps: 0", [], "steps (0): "),
        ("out: a\nsteps: many", [], "steps ('many'): "),
        ("out: a\noptimizer: {lr: -1}", [], "optimizer.lr (-1): "),
        ("out: a\noptimizer: {betas: [1]}", [], "optimizer.betas ([1.0]) must be two numbers"),
        ("out: a\noptimizer: fast", [], "optimizer ('fast'): "),
        ("out: a\nsteps: 3", ["--steps.more", "1"], "--steps.more: steps is a value, not a section"),
        ("out: a", ["stray"], "unexpected argument 'stray'"),
        ("out: a", ["--"], "unexpected argument '--'"),
        ("- a\n- b", [], "must hold a mapping of keys, not a list"),
        ("out: [", [], "is not valid YAML"),
    ],
)
def test_refusals(tmp_path: Path, text: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(Run, written(tmp_path, text), overrides)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": ["a"]}, "unknown key sources.0.path (did you mean sources.0.paths?)"),
        (
            {"needles": {"short": 3}},
            "unknown key sources.0.needles.short (did you mean sources.0.needles.shortest?)",
        ),
        ({"paths": "a"}, "sources.0.paths ('a'): must be a list, e.g. [a]"),
    ],
)
def test_refusals_inside_a_list(source: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(DataRecipe, {"out": "o", "sources": [{"name": "s", **source}]})
    assert said in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(Run, tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"recipe\.yaml:2 is not valid YAML"):
        load(Run, written(tmp_path, "out: a\n\tsteps: 3\n"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        load(Run, tmp_path / "bytes.yaml")


@pytest.mark.parametrize("verb", VERBS)
def test_a_recipe_of_another_verb_is_told(verb: str) -> None:
    """One of each verb's own: no other's recipe class takes it, and it is told whose it is."""
    shipped = {
        "data prepare": "data-tiny", "data fetch": "manifest-kjv", "extend": "extend-tiny",
        "bench end-to-end": "pipeline-tiny",
    }  # fmt: skip
    path = Path("recipes") / f"{shipped.get(verb, f'{verb}-tiny')}.yaml"
    other = DataRecipe if verb != "data prepare" else ManifestConfig
    with pytest.raises(UserError, match=rf"{path} is a recipe of another verb: dsv3 {verb} {path}"):
        load(other, path)


def test_no_code_is_run_from_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        load(Run, written(tmp_path, "out: !!python/object/apply:os.getcwd []\n"))


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3), ("-3", -3), ("1e-3", 1e-3), ("1E6", 1e6), ("2.5", 2.5), ("true", True), ("null", None),
        ("[1, 2]", [1, 2]), ("{a: 1}", {"a": 1}), ("plain words", "plain words"), ("a: b: c", "a: b: c"),
        ("1e", "1e"), ("e3", "e3"),
    ],
)  # fmt: skip
def test_parse_value(text: str, value: Any) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_parse_overrides() -> None:
    found = parse_overrides(["--a.b", "-1", "--flag", "--c=x=y", "--with-dash", "1", "--last"])
    assert found == {"a.b": -1, "flag": True, "c": "x=y", "with_dash": 1, "last": True}


def test_keys_say_type_meaning_and_default() -> None:
    found = keys(Run)
    assert list(found)[:2] == ["out", "steps"]
    assert found["out"] == ("str", "folder of the run", ...)
    assert found["optimizer.lr"] == ("float", "learning rate", 1e-3)
    assert found["teacher.betas"][2] == [0.9, 0.95]
    assert "optimizer" not in found


def test_dump_is_the_whole_recipe(tmp_path: Path) -> None:
    run = validate(Run, {"out": "ordner/ä", "optimizer": {"lr": 1e-5}})
    text = dump(run)
    assert "ä" in text and list(yaml.safe_load(text)) == ["out", "steps", "optimizer", "teacher"]
    assert load(Run, written(tmp_path, text)) == run


def test_frozen_and_defaults_checked() -> None:
    run = validate(Run, {"out": "a"})
    with pytest.raises(Exception, match="frozen"):
        run.steps = 3  # type: ignore[misc]
