"""Documents and prompts: each document once, examples from where the table says, files of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.common.errors import UserError
from dsv3.evaluate.benchmarks.build import build
from dsv3.evaluate.benchmarks.table import TABLE
from tests.evaluate.benchmarks import package


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.write(tmp_path_factory.mktemp("package"))


def test_each_document_once_after_examples_of_another_split(data: Path) -> None:
    arc = build("arc_easy", data)
    assert len(arc.questions) == 7 and arc.shots == 25
    for number, question in enumerate(arc.questions):
        assert question.gold == number % 3
        (context,) = {context for context, _ in question.choices}
        *shots, last = context.split("\n\n")
        assert last == f"Question: test {number}?\nAnswer:"
        assert shots == [f"Question: val {n}?\nAnswer: y{n}" for n in range(25)]
        assert [text for _, text in question.choices] == [f" a{number}", f" b{number}", " c"]
    assert build("piqa", data).questions[0].choices[0][0] == "Question: how 0?\nAnswer:"


def test_without_another_split_the_last_documents_are_examples_and_not_asked(data: Path) -> None:
    found = build("winogrande", data)
    assert len(found.questions) == 3
    (one, other), gold = found.questions[1].choices, found.questions[1].gold
    shots = "".join(f"Ann {n} saw Bob so {('Ann', 'Bob')[n % 2]} left early.\n\n" for n in range(3, 8))
    assert one == (f"{shots}Ann 1 saw Bob so Ann", " left early.")
    assert other == (f"{shots}Ann 1 saw Bob so Bob", " left early.") and gold == 1


def test_the_packages_own_prompt(data: Path) -> None:
    found = build("gsm8k", data)
    before = "Question: Given?\nAnswer: So the answer is 1.\n\n"
    assert [q.prompt for q in found.questions] == [
        f"{before}Question: What is {n} and {n}?\nAnswer:" for n in range(4)
    ]
    (chat,) = build("gsm8k", data, samples=1, chat=True).questions
    assert chat.prompt[0]["content"].startswith("What is ") and "\\boxed" in chat.prompt[0]["content"]


def test_samples_are_always_the_same_and_from_all_of_it(data: Path) -> None:
    some = [build("arc_easy", data, samples=4).questions for _ in range(2)]
    ids = [question.id for question in some[0]]
    assert some[0] == some[1] and len(ids) == 4 and ids == sorted(ids) != ["0", "1", "2", "3"]


def test_files_of_ones_own_for_every_definition(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"Q{n}",
            "choices": ["one", "two", "three"],
            "answer": "B",
            "passage": "P",
            "subject": "a_b",
        }
        for n in range(7)
    ]
    (tmp_path / "race_high.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build("race_high", tmp_path)
    assert len(found.questions) == 2 and found.questions[0].gold == 1
    context, letter = found.questions[0].choices[2]
    assert letter == " C" and context.endswith("P\nQ0\nA. one\nB. two\nC. three\nAnswer:")
    assert context.startswith("P\nQ2\nA. one\nB. two\nC. three\nAnswer: B\n\n")
    (tmp_path / "race_high.shots.jsonl").write_text(
        "".join(json.dumps({**r, "question": "S"}) + "\n" for r in rows)
    )
    assert len(build("race_high", tmp_path).questions) == 7
    free = [{"question": f"Q{n}", "answer": ["4", "four"]} for n in range(9)]
    for name, definition in TABLE.items():
        if definition.sources:
            continue
        asked = rows if not definition.judge else free
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        assert build(name, tmp_path).questions


def test_groups_have_their_own_examples(tmp_path: Path) -> None:
    def rows(name: str, count: int) -> str:
        docs = [
            {"question": f"{subject} {n}", "choices": ["p", "q"], "answer": n % 2, "subject": subject}
            for subject in ("high_art", "law") for n in range(count)
        ]  # fmt: skip
        return "".join(json.dumps(doc) + "\n" for doc in docs)

    (tmp_path / "mmlu.jsonl").write_text(rows("test", 2))
    (tmp_path / "mmlu.shots.jsonl").write_text(rows("dev", 5))
    found = build("mmlu", tmp_path).questions
    assert len(found) == 4
    for question, subject, other in ((found[0], "high art", "law"), (found[2], "law", "high_art")):
        context = question.choices[0][0]
        head, *parts = context.split("\n\n")
        assert head == f"The following are multiple choice questions (with answers) about {subject}."
        assert len(parts) == 6 and other not in context and parts[1].endswith("Answer: B")


def test_what_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text('{"query": "q", "choices": ["a"], "gold": 0}\n{"query": "q"}\n')
    (tmp_path / "arc_easy.jsonl").write_text('{"query"\n')
    (tmp_path / "boolq.jsonl").write_text('{"query": "q", "choices": ["a"], "gold": 0}\n')
    for name, where, said in (
        ("piqa", None, "needs --data"),
        ("hellaswga", data, "did you mean hellaswag"),
        ("sums:7", data, "from 1 to 5"),
        ("hellaswag", data, "has no oe_eval_tasks/hellaswag/rc_0shot"),
        ("bbh", data, "bbh.jsonl"),
        ("mmlu", data, "has no hf_datasets/hails"),
        ("piqa", tmp_path, "document 2 is malformed: KeyError 'choices'"),
        ("arc_easy", tmp_path, "arc_easy.jsonl:1: not valid JSON"),
        ("boolq", tmp_path, "add more"),
    ):
        with pytest.raises(UserError, match=said):
            build(name, where)
    with pytest.raises(UserError, match="ranks choices"):
        build("piqa", data, chat=True)
