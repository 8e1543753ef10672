"""Other people's software is asked, a difference is seen, what is absent or breaks is a row that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dsv3
from dsv3.bench.interop import oracles, run
from dsv3.bench.interop.case import CHARACTERS, ORIGINAL, Case, Finding, held_out_texts
from dsv3.common.errors import Failure, UserError
from dsv3.config import recipe as recipes
from dsv3.config.data import DataRecipe
from dsv3.config.model import ModelConfig
from dsv3.data.prepare import prepare
from dsv3.data.tokenizer import train
from tests.evaluate.benchmarks.conftest import TEXT
from tests.model.build import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with an MTP module and a tokenizer."""
    folder = tmp_path_factory.mktemp("interop-model") / "model"
    tokenizer = train([TEXT], 340)
    model = tiny_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=2, num_nextn_predict_layers=1)
    dsv3.save(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with held-out documents that are long enough."""
    out = tmp_path_factory.mktemp("interop")
    (out / "text").mkdir()
    for number in range(40):
        (out / "text" / f"{number}.txt").write_text(f"{number}. {TEXT}", encoding="utf-8")
    sources = [{"name": "text", "paths": [str(out / "text")]}]
    tree = {"out": str(out / "data"), "sources": sources, "tokenizer": {"vocab_size": 340}}
    return prepare(recipes.validate(DataRecipe, {**tree, "valid_fraction": 0.3, "workers": 1}))


@pytest.fixture
def case(folder: Path, data: Path, tmp_path: Path) -> Case:
    return Case(run.export(folder, tmp_path / "model"), held_out_texts(data)[:2], None, tmp_path)


def test_transformers_does_as_we_do_and_is_seen_where_it_does_not(case: Case) -> None:
    pytest.importorskip("transformers")
    case.answers[1].token_ids[5] += 1
    found = oracles.transformers(case)
    assert [(f.what, f.agrees) for f in found] == [
        ("token ids", True), ("logits", True), ("logits, with YaRN", True),
        ("generate: greedy tokens", False), ("generate, use_mtp: greedy tokens", False),
    ]  # fmt: skip
    assert found[3].figure == found[4].figure == "1 of 2 prompts the same"


def test_the_extended_model_is_asked_beyond_its_original_length(case: Case) -> None:
    extended = case.extended
    assert ModelConfig.from_pretrained(case.folder).rope_scaling is None
    scaling = ModelConfig.from_pretrained(extended.folder).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == ORIGINAL
    assert min(len(case.llm.encode(prompt)) for prompt in extended.prompts) > 2 * ORIGINAL


def test_prompts_are_held_out(case: Case, data: Path) -> None:
    assert all(len(prompt) <= CHARACTERS and text.startswith(prompt)
               for prompt, text in zip(case.prompts, case.texts))  # fmt: skip
    asked = oracles.questions(case.texts)
    assert {question.gold for question in asked} == {0, 1}
    for question in asked:
        (context, right), (other, wrong) = question.choices
        assert context == other and right.startswith(" ") and wrong.startswith(" ")


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> dict[str, run.Oracle]:
    def breaks(case: Case) -> list[Finding]:
        raise ValueError("no such thing\nand more")

    made = {
        "good": run.Oracle(lambda case: [Finding("all", True, "6 of 6")], "torch", "pip install torch"),
        "broken": run.Oracle(breaks, "torch", "pip install torch"),
        "absent": run.Oracle(breaks, "no-such-package-dsv3", "pip install it"),
        "llama": run.Oracle(breaks, None, "build it"),
    }
    monkeypatch.setattr(run, "ORACLES", made)
    return made


def test_rows(others: dict[str, run.Oracle], folder: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    results = run.bench(folder, data, tmp_path / "out", page=page)
    assert run.failed(results) == ["broken"]
    text = page.read_text()
    assert "| good | 2." in text and "| all | agrees | 6 of 6 |" in text
    assert "| ran | **differs** | ValueError: no such thing |" in text
    assert "| absent |  | all | not installed | pip install it |" in text
    assert "| llama |  | all | not installed | build it |" in text
    assert "broken" in run.report(results) and "DIFFERS" in run.report(results)

    # Asked again alone, the other rows stay; they are on the disk after each.
    others["broken"] = others["good"]
    again = run.bench(folder, data, tmp_path / "out", only=("broken",), page=page)
    assert run.failed(again) == [] and list(again) == list(others)
    assert again["good"] == results["good"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == again


def test_what_is_wrong_is_said_before_anything_is_written(folder: Path, data: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    for words, said in (
        ((folder, data, out, None, ("vllm",)), "--only \\(vllm\\) is no oracle; there are transformers"),
        ((tmp_path, data, out), "holds no config.json; train one with dsv3 quickstart"),
        ((folder, tmp_path, out), "no prepared data"),
        ((folder, data, out, tmp_path), "has no llama-completion"),
    ):
        with pytest.raises(UserError, match=said):
            run.bench(*words, page=page)
    assert not out.exists() and not page.exists()


@pytest.mark.slow
def test_everything_that_is_installed(folder: Path, data: Path, tmp_path: Path) -> None:
    from dsv3.cli.main import app

    words = [
        str(folder),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--page",
        str(tmp_path / "p.md"),
    ]
    done = CliRunner().invoke(app, ["bench", "interop", *words, "--json"])
    assert done.exception is None or not isinstance(done.exception, Failure), done.output
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert not run.failed(found)
    assert set(found) == set(run.ORACLES)
