"""JSONL in, JSONL out: killed and resumed, bad lines refused by file and line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dsv3
from dsv3.common.errors import UserError
from dsv3.data.tokenizer import train
from dsv3.serve.batch import generate_file
from tests.model.build import tiny_model

WISH = dsv3.SamplingParams(max_tokens=16, temperature=0.8, seed=0, ignore_eos=True)
PROMPTS = [{"prompt": f"word {number % 7}"} for number in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch") / "model"
    tokenizer = train(["a word and 1 2 3 more words 4 5 6"] * 9, 330)
    dsv3.save(tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> dsv3.LLM:
    return dsv3.LLM(folder, cache_tokens=1024, max_batch=4, draft_tokens=1)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_killed_and_resumed_gives_the_same_file(folder: Path, llm: dsv3.LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", PROMPTS)
    assert generate_file(llm, source, tmp_path / "whole.jsonl", WISH, "m") == 24
    target, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    code = (
        "import dsv3, sys; from pathlib import Path; from dsv3.serve.batch import generate_file\n"
        f"llm = dsv3.LLM({str(folder)!r}, cache_tokens=1024, max_batch=4, draft_tokens=1)\n"
        "run = llm.engine.runner.run\n"
        "import time; llm.engine.runner.run = lambda chunks: (time.sleep(0.01), run(chunks))[1]\n"
        f"wish = dsv3.SamplingParams(**{dict(vars(WISH))!r})\n"
        f"generate_file(llm, Path({str(source)!r}), Path({str(target)!r}), wish, 'm')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 6):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9 and not target.exists()
    with open(part, "ab") as file:
        file.write(b'{"line": 24, "text": "half a l')  # and a line was being written
    before = part.read_bytes().count(b"\n") - 1
    with pytest.raises(UserError, match="is of another input or other options"):
        generate_file(llm, source, target, WISH, "another model")
    steps = llm.engine.stats.prompt_tokens
    assert generate_file(llm, source, target, WISH, "m") == 24
    assert 0 < llm.engine.stats.prompt_tokens - steps <= (24 - before) * 8
    assert not part.exists()
    whole, resumed = ((tmp_path / name).read_text().splitlines() for name in ("whole.jsonl", "out.jsonl"))
    told = [[json.loads(line)[key] for key in ("line", "prompt", "text")] for line in whole]
    assert told == [[json.loads(line)[key] for key in ("line", "prompt", "text")] for line in resumed]
    assert [line for line, _, _ in told] == list(range(1, 25))
    assert len({text for _, _, text in told}) > 20  # equal prompts, other seeds
    with pytest.raises(UserError, match="already exists"):
        generate_file(llm, source, target, WISH, "m")


def test_own_options_of_a_line(llm: dsv3.LLM, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a word", "temperature": 0, "max_tokens": 3, "logprobs": 1},
        {"prompt": "a", "suffix": "b", "n": 2, "seed": 5},
        {"prompt": "a word", "logit_bias": {"7": 100}, "max_tokens": 2, "repetition_penalty": 1.0},
    ]
    source = write(tmp_path / "in.jsonl", lines)
    source.write_text("\n" + source.read_text())
    generate_file(llm, source, tmp_path / "out.jsonl", WISH)
    first, second, third = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["line"] == 2 and len(first["logprobs"]) == 3
    (greedy,) = llm.generate("a word", dsv3.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    assert first["text"] == greedy.text and first["usage"]["completion_tokens"] == 3
    (fim,) = llm.generate([llm.encode("a", "b")], dsv3.SamplingParams(**{**vars(WISH), "n": 2, "seed": 5}))
    assert second["texts"] == [c.text for c in fim.completions] and second["text"] == fim.text
    assert third["text"] == llm.tokenizer.decode([7, 7])  # type: ignore[union-attr]


def test_schemas_and_scores_of_a_line(llm: dsv3.LLM, tmp_path: Path) -> None:
    lines: list[Any] = [
        {"prompt": "a word", "json_schema": {"enum": ["yes", "no"]}},
        {"prompt": "a word", "grammar": 'start: "more " ("words" | "and")'},
        {"prompt": "a word", "max_tokens": 0, "prompt_logprobs": 1},
    ]
    generate_file(llm, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", WISH)
    first, second, third = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert json.loads(first["text"]) in ("yes", "no") and first["finish_reason"] == "stop"
    assert second["text"] in ("more words", "more and")
    assert third["text"] == "" and third["prompt_logprobs"][0] is None
    scored = [score["token_id"] for score in third["prompt_logprobs"][1:]]
    assert scored == llm.encode("a word")[1:] and third["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON"),
        ('"text"', 'must be an object with a text "prompt"'),
        ('{"prompt": 3}', 'must be an object with a text "prompt"'),
        ('{"prompt": "a", "temprature": 1}', r"'temprature' is unknown \(did you mean temperature\?\)"),
        ('{"prompt": "a", "top_p": 7}', r"top_p \(7\) must be from 0 to 1"),
        ('{"prompt": "a", "suffix": 1}', r"suffix \(1\) must be a text"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        ('{"prompt": "a", "json_schema": "x"}', r"json_schema \('x'\) must be a JSON object"),
        ('{"prompt": "a", "json_schema": {"not": {}}}', "json_schema is refused: Unimplemented keys"),
        ('{"prompt": "a", "grammar": "start: b"}', "grammar is refused: .*unknown name"),
        (json.dumps({"prompt": "word " * 2000}), "tokens and max_length is"),
    ],
)
def test_a_bad_line_is_refused_before_any_work(
    llm: dsv3.LLM, tmp_path: Path, line: str, message: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"in\.jsonl:3: .*{message}"):
        generate_file(llm, source, tmp_path / "out.jsonl", WISH)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert not llm.engine.busy
