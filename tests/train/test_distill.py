"""The job of distillation: what is written, that a killed run goes on to the same end, mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3.common.errors import Failure, UserError
from dsv3.config import recipe as recipes
from dsv3.config.distill import DistillRecipe
from dsv3.data.chat import render
from dsv3.evaluate import tasks
from dsv3.evaluate.experts import Answer, Question
from dsv3.evaluate.judge import parse_score
from dsv3.train.distill import distill, questions_of

TASKS = [{"name": "sums", "difficulty": 2, "count": 12}, {"name": "reversing", "count": 8}]


def recipe_of(out: Path, **changes: Any) -> DistillRecipe:
    tree = {
        "out": str(out), "prompts": {"tasks": TASKS}, "expert": {"slips": 0.5}, "sampling": {"samples": 3}
    }  # fmt: skip
    return recipes.validate(DistillRecipe, {**tree, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Scripted:
    """An expert with prepared answers."""

    def __init__(self, *texts: str, finish: str = "stop", last: Exception | None = None):
        self.answers = [Answer(text, finish) for text in texts]
        self.last = last
        self.asked: list[str] = []

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[Question, list[Answer]]]:
        for place, question in enumerate(questions):
            if self.last is not None and place == 2:
                raise self.last
            self.asked.append(question.id)
            gold = str(question.row.get("answer", question.row.get("solution")))
            yield (
                question,
                [
                    Answer(a.text.replace("GOLD", gold), a.finish_reason, error="x" * (not a.text) or None)
                    for a in self.answers
                ],
            )


def test_both_kinds_of_samples_and_pairs(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    report = distill(recipe)
    attempts = lines(tmp_path / "attempts.jsonl")
    assert len(attempts) == 20 * 3 == report["attempts"]
    for line in attempts:  # every one is judged by its own verifier
        source = tasks.get(line["task"])
        example = next(q for q in questions_of(recipe.prompts) if q.id == line["id"])
        judged = tasks.Example(
            line["id"], line["task"], line["prompt"], example.row["answer"], example.row["metadata"]
        )
        assert line["score"] == source.verify(line["response"], judged)
        assert (line["dropped"] == "wrong") == (line["score"] == 0)
    kept = [line for line in attempts if line["dropped"] is None]
    assert 0 < report["kept"] == len(kept) < 20 or report["answered"] == 20
    assert len({line["id"] for line in kept}) == len(kept)

    samples = lines(tmp_path / "samples.jsonl")
    original = [s["messages"] for s in samples if s["kind"] == "original"]
    reasoned = [s["messages"] for s in samples if s["kind"] == "reasoned"]
    assert len(original) == 20 and len(reasoned) == len(kept) and report["samples"] == len(samples)
    assert [m["role"] for m in original[0]] == ["user", "assistant"]
    assert original[0][1]["content"].startswith("\\boxed{")
    assert [m["role"] for m in reasoned[0]] == ["system", "user", "assistant"]
    assert reasoned[0][0]["content"] == recipe.system
    assert {m[2]["content"] for m in reasoned} == {line["response"] for line in kept}
    assert all("</think>" in render(m, keep_think=True).text for m in reasoned)

    pairs = lines(tmp_path / "pairs.jsonl")
    assert pairs and report["pairs"] == len(pairs)
    by_text = {(line["prompt"], line["response"]): line for line in attempts}
    for pair in pairs:
        asked = pair["prompt"][-1]["content"]
        assert by_text[asked, pair["chosen"][0]["content"]]["score"] == 1
        assert by_text[asked, pair["rejected"][0]["content"]]["score"] == 0
    judgements = lines(tmp_path / "judgements.jsonl")
    assert report["judgements"] == len(judgements) > len(kept)
    for line in judgements:
        asked, said = (message["content"] for message in line["messages"])
        answer = asked.partition("# Answer\n")[2]
        scores = {a["score"] for a in attempts if a["id"] == line["id"] and a["response"].endswith(answer)}
        assert scores == {parse_score(said)}
    assert (tmp_path / "plots/outcomes.png").stat().st_size > 1000
    assert (tmp_path / "plots/lengths.png").exists()
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["tasks"]["sums"]["prompts"] == 12 and report["tasks"]["reversing"]["attempts"] == 24


def test_the_shortest_right_answer_is_kept(tmp_path: Path) -> None:
    expert = Scripted("first of all, \\boxed{GOLD}", "\\boxed{GOLD}", "no idea")
    report = distill(recipe_of(tmp_path), expert=expert)
    assert report["kept"] == 20 and report["dropped"] == {"wrong": 20, "longer than kept": 20}
    assert report["right"] == 40 and report["answered"] == 20
    texts = {line["response"] for line in lines(tmp_path / "attempts.jsonl") if line["dropped"] is None}
    assert all(text.startswith("\\boxed{") for text in texts)


def test_only_what_the_expert_wrote(tmp_path: Path) -> None:
    report = distill(recipe_of(tmp_path, originals=False))
    kinds = [line["kind"] for line in lines(tmp_path / "samples.jsonl")]
    assert kinds == ["reasoned"] * report["kept"] and kinds


def test_own_problems(tmp_path: Path) -> None:
    problems = [
        {"prompt": "What is half of 3?", "solution": "It is \\boxed{3/2}."},
        {"prompt": "Name the capital of France.", "answer": "Paris", "id": "paris"},
        {**tasks.get("gcd").sample(0).row()},
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in problems))
    recipe = recipe_of(
        tmp_path / "out",
        prompts={"file": str(path)},
        expert={"kind": "engine", "model": "given"},
        sampling={"samples": 1},
    )

    class Knows(Scripted):
        def answer(self, questions: Sequence[Question]) -> Iterator[tuple[Question, list[Answer]]]:
            said = ["<think>hm</think>\\boxed{1.5}", "\\boxed{paris}", "\\boxed{0}"]
            yield from zip(questions, ([Answer(text, "stop")] for text in said))

    distill(recipe, expert=Knows())
    found = {line["prompt"]: line["score"] for line in lines(tmp_path / "out/attempts.jsonl")}
    assert found == {problems[0]["prompt"]: 1, problems[1]["prompt"]: 1, problems[2]["prompt"]: 0}
    samples = lines(tmp_path / "out/samples.jsonl")
    assert [s["messages"][1]["content"] for s in samples if s["kind"] == "original"][:2] == [
        "It is \\boxed{3/2}.", "\\boxed{Paris}"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "1 is not JSON"),
        ('{"prompt": 3}', "1: prompt must be a text"),
        ('{"prompt": "a"}', "1: needs solution or answer"),
        ('{"prompt": "a", "task": "sum", "metadata": {}}', "1: task (sum) is unknown (did you mean sums?)"),
        ('{"prompt": "a", "task": "sums"}', "1: answer and metadata must be those of task sums"),
        (
            '{"prompt": "a", "task": "sums", "answer": "1", "metadata": {"word": "b"}}',
            "1: answer and metadata must be those of task sums",
        ),
    ],
)
def test_bad_problems_are_named_by_line(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(UserError) as caught:
        distill(recipe_of(tmp_path / "out", prompts={"file": str(path)}))
    assert f"{path}:{words}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": {}}, "prompts needs tasks or file"),
        ({"prompts": {"tasks": [{"name": "sums", "count": 999}]}}, "sums at difficulty 1 has no more than"),
        ({"prompts": {"tasks": [{"name": "sum", "count": 1}]}}, r"task \(sum\) is unknown"),
        ({"expert": {"kind": "engine"}}, "expert.model is required"),
        ({"expert": {"kind": "endpoint", "model": "m", "base_url": "localhost"}}, "must be an address"),
        ({"prompts": {"file": "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        distill(recipe_of(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_solver_without_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match="solver"):
        distill(recipe_of(tmp_path / "out", prompts={"file": str(path)}))
    assert not (tmp_path / "out").exists()


# -- going on


def same(one: Path, other: Path) -> bool:
    names = ("samples.jsonl", "pairs.jsonl", "judgements.jsonl", "report.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_kill_nine_then_resume_ends_the_same(tmp_path: Path) -> None:
    tree = {"prompts": {"tasks": [{"name": "sums", "difficulty": 3, "count": 150}]}, "expert": {"slips": 0.4}}
    unbroken = tmp_path / "unbroken"
    distill(recipes.validate(DistillRecipe, {**tree, "out": str(unbroken)}))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**tree, "out": str(tmp_path / "run")}))
    command = [sys.executable, "-m", "dsv3", "distill", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "run/attempts.jsonl"
    for _ in range(6000):
        if journal.exists() and journal.read_bytes().count(b"\n") >= 40:
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes().count(b"\n")
    assert 40 <= before < 600 and not (tmp_path / "run/samples.jsonl").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "--resume auto" in again.stderr
    done = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "run", unbroken)
    assert "pairs" in done.stdout and "next: dsv3 sft" in done.stdout


def test_half_a_line_and_half_a_prompt_are_asked_again(tmp_path: Path) -> None:
    distill(recipe_of(tmp_path / "whole"))
    distill(recipe_of(tmp_path / "cut"))
    journal = tmp_path / "cut/attempts.jsonl"
    content = journal.read_bytes()
    for size in (len(content) - 7, content.index(b"\n") + 1, 10):
        journal.write_bytes(content[:size])
        (tmp_path / "cut/samples.jsonl").unlink()
        distill(recipe_of(tmp_path / "cut"), resume=True)
        assert same(tmp_path / "cut", tmp_path / "whole")
        assert len(lines(journal)) == 60


def test_errors_are_asked_again_and_failure_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="down"):
        distill(recipe_of(tmp_path), expert=Scripted("\\boxed{GOLD}", "no", "", last=Failure("down")))
    assert len(lines(tmp_path / "attempts.jsonl")) == 6
    broken = Scripted("\\boxed{GOLD}", "no", "", finish="error")
    report = distill(recipe_of(tmp_path), resume=True, expert=broken)
    assert len(broken.asked) == 18 and report["dropped"]["error"] == 54
    fine = Scripted("\\boxed{GOLD}", "no", "x")
    report = distill(recipe_of(tmp_path), resume=True, expert=fine)
    assert len(fine.asked) == 18 and "error" not in report["dropped"]
    assert report["kept"] == 20


def test_rejection_may_change_and_nobody_is_asked(tmp_path: Path) -> None:
    answers = ("at length \\boxed{GOLD}", "\\boxed{GOLD}", "等于 four words or so \\boxed{GOLD}")
    report = distill(recipe_of(tmp_path), expert=Scripted(*answers))
    assert report["kept"] == 20 and report["dropped"]["mixed language"] == 20
    nobody = Scripted()
    changed = recipe_of(tmp_path, rejection={"keep": 2, "foreign": 0.9})
    report = distill(changed, resume=True, expert=nobody)
    assert not nobody.asked and report["kept"] == 40 and "mixed language" not in report["dropped"]
    assert sum(line["dropped"] is None for line in lines(tmp_path / "attempts.jsonl")) == 40


def test_another_recipe_does_not_go_on(tmp_path: Path) -> None:
    distill(recipe_of(tmp_path))
    before = (tmp_path / "attempts.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"seed \(3\) differs from the run in"):
        distill(recipe_of(tmp_path, seed=3), resume=True)
    with pytest.raises(UserError, match=r"^expert\.slips \(0\.1\) differs from the run in \S+ \("):
        distill(recipe_of(tmp_path, expert={"slips": 0.1}), resume=True)
    with pytest.raises(UserError, match="already holds attempts"):
        distill(recipe_of(tmp_path))
    assert (tmp_path / "attempts.jsonl").read_bytes() == before
    distill(recipe_of(tmp_path, expert={"slips": 0.5, "timeout": 1, "concurrency": 2}), resume=True)
