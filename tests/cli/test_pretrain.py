"""The verbs as a user types them: prepare, pretrain, generate; mistakes end with one line and exit 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.hidden_size", "32", "--model.moe_intermediate_size", "16", "--model.n_routed_experts", "8",
    "--model.intermediate_size", "48", "--model.num_hidden_layers", "2", "--sequence_length", "32",
    "--batch.sequences", "4", "--batch.micro_sequences", "4", "--total_tokens", "1024",
    "--model.vocab_size", "512", "--validation.sequences", "2", "--samples.tokens", "2",
]  # fmt: skip


def dsv3(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dsv3", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for number in range(120):
        (folder / f"{number}.txt").write_text(f"note {number}: a token is chosen, and then another. " * 8)
    recipe = folder / "data.yaml"
    recipe.write_text(
        f"out: {folder}/data\nsources: [{{name: notes, weight: 1, paths: ['{folder}/*.txt']}}]\n"
        "tokenizer: {vocab_size: 400}\nvalid_fraction: 0.1\nworkers: 1\n"
    )
    done = dsv3("data", "prepare", str(recipe))
    assert done.returncode == 0, done.stderr
    return folder / "data"


def test_pretrain_then_generate(data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    recipe = ["pretrain", "recipes/pretrain-tiny.yaml", "--data.path", str(data), "--out", out, *SMALL]
    done = dsv3(*recipe)
    assert done.returncode == 0, done.stderr
    assert f"next: dsv3 generate {out}/model" in done.stdout
    assert "tok/s" in done.stderr and "held-out" in done.stderr
    again = dsv3(*recipe)
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert "--resume auto" in again.stderr
    text = dsv3("generate", f"{out}/model", "--prompt", "a token", "--max-tokens", "4")
    assert text.returncode == 0, text.stderr
    middle = dsv3("generate", f"{out}/model", "--prompt", "a", "--suffix", "b", "--max-tokens", "4")
    assert middle.returncode == 0, middle.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "nowhere.yaml"], "recipe nowhere.yaml does not exist"),
        (["pretrain", "recipes/pretrain-tiny.yaml", "--optimiser.lr", "1"], "did you mean optimizer"),
        (["pretrain", "recipes/pretrain-tiny.yaml", "--optimizer.lr", "fast"], "optimizer.lr ('fast')"),
        (["pretrain", "recipes/pretrain-tiny.yaml", "--data.path", "nodata"], "dsv3 data prepare"),
        (["pretrain", "recipes/pretrain-tiny.yaml", "--total_tokens"], "total_tokens (True): needs a number"),
        (["pretrain", "recipes"], "recipe recipes is a folder"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["plan", "params", "v4"], "v4"),
        (["bench", "train", "--case", "tpu"], "--case (tpu) is unknown"),
    ],
)
def test_a_mistake_is_one_line_and_exit_two(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = dsv3(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 2


def test_help_is_light_and_says_every_key() -> None:
    dsv3("--help")  # once, so that the byte code is there
    taken = []
    for _ in range(3):
        before = os.times()
        assert dsv3("--help").returncode == 0
        after = os.times()  # of the processor: others may be using it
        taken.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(taken) < 0.5
    text = dsv3("pretrain", "--help").stdout
    for words in (
        "optimizer.lr  (float)",
        "peak learning rate [default: 0.00022]",
        "model.preset",
        "--resume",
    ):
        assert words in text


def test_quickstart_outside_the_repository_is_refused(tmp_path: Path) -> None:
    done = dsv3("quickstart", cwd=tmp_path)
    assert done.returncode == 2 and "run quickstart in the repository" in done.stderr


@pytest.mark.slow
def test_quickstart_end_to_end(tmp_path: Path) -> None:
    """Without a network it goes on with the standard library alone."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = dsv3("quickstart", "--total-tokens", "20000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "[[" in done.stdout
    run = tmp_path / "runs/quickstart"
    assert (run / "model/config.json").exists() and (run / "plots/loss.png").exists()
