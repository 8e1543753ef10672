from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsv3.cli.recipe_help import describe
from dsv3.config.data import DataRecipe


def dsv3(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dsv3", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(
            f"Text {number}. " + "Some words, again and again.\n" * 30
        )
    tree = {
        "out": "out",
        "sources": [{"name": "mine", "paths": ["texts"]}],
        "tokenizer": {"vocab_size": 300},
        "valid_fraction": 0.2,
        "workers": 1,
    }
    manifest = Path(__file__).parents[2] / "recipes" / "manifest-kjv.yaml"
    (tmp_path / "manifest.yaml").write_text(manifest.read_text())
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_prepare_trains_writes_and_says_what_next(recipe: Path) -> None:
    done = dsv3("data", "prepare", "recipe.yaml", "--valid_fraction", "0.3", cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert "MB/s" in done.stdout
    assert "next: dsv3 pretrain RECIPE.yaml --data.path out" in done.stdout
    manifest = json.loads((recipe.parent / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["valid_fraction"] == 0.3
    again = dsv3("data", "prepare", "recipe.yaml", "--valid_fraction=0.3", "--json", cwd=recipe.parent)
    result = json.loads(again.stdout)
    assert result["mb_per_second"] is None
    assert result["sources"]["mine"]["train"]["documents"] > 10


def test_tokenizer_train_then_prepare(recipe: Path) -> None:
    done = dsv3("tokenizer", "train", "recipe.yaml", "--to", "tok", cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert "next: dsv3 data prepare recipe.yaml --tokenizer.path tok" in done.stdout
    done = dsv3("data", "prepare", "recipe.yaml", "--tokenizer.path", "tok", cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (recipe.parent / "out" / name).read_bytes() == (recipe.parent / "tok" / name).read_bytes()
    again = dsv3("tokenizer", "train", "recipe.yaml", "--to", "tok", cwd=recipe.parent)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "holds a tokenizer already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "prepare", "none.yaml"], "recipe none.yaml does not exist"),
        (["data", "prepare", "recipe.yaml", "--sed", "1"], "unknown key sed (did you mean seed?)"),
        (["data", "prepare", "recipe.yaml", "stray"], "unexpected argument 'stray'"),
        (["data", "prepare", "recipe.yaml", "--fim_rate", "lots"], "fim_rate ('lots')"),
        (
            ["data", "fetch", "recipe.yaml", "--to", "x"],
            "recipe of another verb: dsv3 data prepare recipe.yaml",
        ),
        (
            ["tokenizer", "train", "recipe.yaml", "--to", "/dev/null/x"],
            "--to (/dev/null/x) cannot be",
        ),
        (["data", "fetch", "manifest.yaml", "--to", "/dev/null/x"], "--to (/dev/null/x) cannot be"),
        (["tokenizer", "train", "recipe.yaml", "--to", "x", "--tokenizer.path", "y"], "nothing to train"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(recipe: Path, arguments: list[str], message: str) -> None:
    done = dsv3(*arguments, cwd=recipe.parent)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert sorted(p.name for p in recipe.parent.iterdir()) == ["manifest.yaml", "recipe.yaml", "texts"]


def test_help_shows_every_key() -> None:
    done = dsv3("data", "prepare", "--help")
    assert done.returncode == 0
    for word in (
        "sources[].weight",
        "tokenizer.vocab_size",
        "fim_rate",
        "[default: 8192]",
        "[required]",
        "characters;",
    ):
        assert word in done.stdout, word
    assert describe(DataRecipe) in done.stdout
    assert "sha256" in dsv3("data", "fetch", "--help").stdout
