"""``dsv3 sft`` as a user types it: what bears loss is shown, mistakes are one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dsv3.checkpoint.hf import save
from dsv3.cli.main import main
from dsv3.config import recipe as recipes
from dsv3.config.model import ModelConfig
from dsv3.config.sft import SFTRecipe
from dsv3.data.tokenizer import train
from dsv3.model import DeepSeekV3
from tests.train.conftest import MODEL

ROOT = Path(__file__).parents[2]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>hm</think>Hello"}]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    train(["Hi Hello"], 300).save(folder / "words")
    files = [folder / "words" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    save(DeepSeekV3(ModelConfig(**MODEL)), folder / "model", tokenizer_files=files)
    return folder / "model"


@pytest.fixture
def run(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function from rows and words of the command line to exit code, output and errors."""

    def call(rows: list[dict], *words: str) -> tuple[int, str, str]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = tmp_path / "sft.yaml"
        recipe.write_text(
            f"out: {tmp_path}/run\nstart: {start}\nsequence_length: 32\ndata:\n  train: {path}\n"
        )
        monkeypatch.setattr(sys, "argv", ["dsv3", "sft", str(recipe), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_show_marks_what_bears_loss(run, tmp_path: Path) -> None:
    rows = [{"messages": TALK}, {"text": "Hello " * 50}, {"text": "unseen"}]
    code, out, err = run(rows, "--show", "2")
    assert code == 0 and not err
    begin, end = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>", "<｜end▁of▁sentence｜>"
    assert f"{begin}[[<think>hm</think>Hello{end}]]\n" in out
    assert f"== {tmp_path}/rows.jsonl:1: " in out and "unseen" not in out
    assert "longer than sequence_length (32): data.long is cut" in out
    assert out.endswith("what stands between [[ and ]] bears loss\n")
    assert "[[Hello<｜end" in run(rows, "--show", "1", "--data.keep_think", "false")[1]
    assert not (tmp_path / "run").exists()


def test_show_is_coloured_on_a_terminal(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = run([{"messages": TALK}], "--show", "1")
    assert "\x1b[32m<think>hm</think>Hello" in out and "[[" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[<think>" in run([{"messages": TALK}], "--show", "1")[1]


@pytest.mark.parametrize("words", [(), ("--show", "3")])
def test_a_bad_example_is_one_line(run, tmp_path: Path, words: tuple[str, ...]) -> None:
    code, _, err = run([{"messages": TALK}, {"messages": [{"role": "user"}]}], *words)
    last = err.splitlines()[-1]
    assert (
        code == 2 and last.startswith(f"dsv3: {tmp_path}/rows.jsonl:2: messages ") and "Traceback" not in err
    )
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipe_falls_as_the_reports(start: Path) -> None:
    words = ["--start", str(start), "--sequence_length", "64"]
    recipe = recipes.load(SFTRecipe, ROOT / "recipes/sft-tiny.yaml", words)
    assert recipe.data.keep_think
    factors = recipe.schedule.learning_rate
    assert factors[0].to == 1 and factors[-1].to == pytest.approx(1e-6 / 5e-6)
    plain = recipes.validate(SFTRecipe, {"start": str(start), "data": {"train": "x"}, "sequence_length": 64})
    assert plain.epochs == 2 and plain.optimizer.lr == 5e-6 and plain.schedule.learning_rate == factors
