"""The verbs distill, reward and judge as a user types them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dsv3.checkpoint.hf import save
from dsv3.cli.main import main
from dsv3.data.tokenizer import train
from tests.model.build import tiny_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dsv3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, standard output and standard error of a command, in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsv3", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "distill.yaml"
    tasks = [{"name": "gcd", "count": 6}, {"name": "letters", "count": 4}]
    tree = {"prompts": {"tasks": tasks}, "out": str(tmp_path / "out"), "expert": {"slips": 0.5}}
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_distill_says_what_was_kept_and_what_is_next(dsv3: Run, recipe: str, tmp_path: Path) -> None:
    code, said, progress = dsv3("distill", recipe, "--sampling.samples", "2")
    assert code == 0 and "prompts/s" in progress
    assert said.splitlines()[1].split() == [
        "task", "prompts", "answered", "attempts", "right", "kept", "dropped"
    ]  # fmt: skip
    assert f"--data.train '[{tmp_path}/out/samples.jsonl]'" in said
    code, said, _ = dsv3("distill", recipe, "--sampling.samples", "2", "--resume", "auto", "--json")
    assert code == 0 and json.loads(said)["attempts"] == 20


def test_nothing_kept_is_said(dsv3: Run, recipe: str) -> None:
    code, said, _ = dsv3(
        "distill", recipe, "--prompts.tasks", "[{name: gcd, count: 3}]", "--expert.slips", "1"
    )
    assert code == 0 and "nothing was kept" in said and "next:" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "yes"], "--resume (yes) must be auto"),
        (["--expert.kind", "oracle"], "expert.kind ('oracle')"),
        (["--expert.slip", "1"], "did you mean expert.slips"),
        (["--prompts.tasks", "[{name: gdc, count: 1}]"], "task (gdc) is unknown (did you mean gcd?)"),
        (["--expert.kind", "engine", "--expert.model", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_two(
    dsv3: Run, recipe: str, tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, said, error = dsv3("distill", recipe, *arguments)
    assert code == 2 and not said and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_judge(dsv3: Run, tmp_path: Path) -> None:
    words = train(["Judge the answer to the question. First think, then give a number"] * 9, 360)
    words.save(tmp_path / "words")
    files = [tmp_path / "words" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    save(tiny_model(vocab_size=words.vocab_size), tmp_path / "model", tokenizer_files=files)
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(3)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["judge", str(pairs), "--model", str(tmp_path / "model"), "--votes", "2", "--max-tokens", "3"]
    code, said, _ = dsv3(*command, "--count", "2", "--out", str(tmp_path / "votes.jsonl"))
    assert code == 0 and said.startswith("50.0% +- 0.0% of 2 pairs right (0 decided; 4 of 4 answers without")
    votes = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert len(votes) == 2 and votes[0]["chosen"] == "yes" and votes[0]["chosen_score"] is None
    code, said, _ = dsv3(*command, "--json")
    assert json.loads(said)["unreadable"] == 1 and json.loads(said)["pairs"] == 3
    code, said, error = dsv3("judge", "nowhere.jsonl", "--model", str(tmp_path / "model"))
    assert code == 2 and "nowhere.jsonl does not exist" in error and error.count("\n") == 1
    code, said, error = dsv3("judge", str(pairs), "--model", "m", "--base-url", "localhost")
    assert code == 2 and "must be an address" in error


@pytest.mark.parametrize("name", ["distill", "reward"])
def test_recipes_that_ship_are_valid(name: str) -> None:
    from dsv3.config.distill import DistillRecipe
    from dsv3.config.recipe import keys, load
    from dsv3.config.reward import RewardRecipe

    path = Path(__file__).parents[2] / f"recipes/{name}-tiny.yaml"
    if name == "distill":
        read = load(DistillRecipe, path)
        assert read.prompts.tasks[0].count == 400
        told = path.read_text()
        assert all(f"{key.rpartition('.')[2]}:" in told for key in keys(DistillRecipe))
    else:
        tree = yaml.safe_load(path.read_text())
        assert set(tree) <= set(RewardRecipe.model_fields)


def test_interrupted_says_how_to_go_on(dsv3: Run, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3.evaluate.experts import Solver

    whole = Solver.answer

    def interrupted(self: Solver, questions):  # type: ignore[no-untyped-def]
        for number, found in enumerate(whole(self, questions)):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Solver, "answer", interrupted)
    code, said, _ = dsv3("distill", recipe)
    assert code == 130 and "stopped; nothing is lost. Go on with: dsv3 distill" in said
    monkeypatch.setattr(Solver, "answer", whole)
    resumed = str(Path(recipe).parent / "out/recipe.yaml")  # what it named
    code, said, _ = dsv3("distill", resumed, "--resume", "auto")
    assert code == 0 and "all" in said
