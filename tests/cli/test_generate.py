"""``dsv3 generate`` and ``dsv3 chat`` as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3 as package
from dsv3.cli.chat import _answer
from dsv3.cli.generate import open_llm
from dsv3.data.chat import encode
from dsv3.data.tokenizer import train
from tests.model.build import tiny_model


def dsv3(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsv3", *arguments], capture_output=True, text=True, input=said
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = train(["some words to learn from and to say again"] * 9, 330)
    package.save(tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1), folder)
    tokenizer.save(folder)
    return folder


def test_a_file_of_prompts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "some"}\n{"prompt": "words"}\n')
    files = ["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/out.jsonl"]
    done = dsv3("generate", str(folder), *files, "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["some", "words"]


def test_chat(folder: Path) -> None:
    said = "some words\n\n/new\nagain\n/exit\nnot read\n"
    done = dsv3("chat", str(folder), "--max-tokens", "5", "--temperature", "0", said=said)
    assert done.returncode == 0, done.stderr
    llm = open_llm(folder, None)
    assert llm.engine.options.draft_tokens == 1
    wish = package.SamplingParams(max_tokens=5, temperature=0)
    wanted = ""
    for content in ("some words", "again"):
        assert llm.tokenizer is not None
        ids, _ = encode(llm.tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True)
        wanted += llm.generate([ids], wish)[0].text + "\n"
    assert done.stdout == wanted.replace("\r\n", "\n").replace("\r", "\n")  # as text mode reads it


def test_chat_says_how_fast_it_was(folder: Path) -> None:
    done = dsv3("chat", str(folder), "--max-tokens", "4", "--speed", said="some words\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[4 tokens, [0-9.]+ a second .*B of weights, .*B/s: \d+ % of it used", done.stderr)


def test_chat_keeps_its_history_and_reads_it_from_the_cache(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = package.LLM(folder, draft_tokens=1, cache_tokens=512)
    messages = [{"role": "system", "content": "say some words again and again " * 3}]
    wish = package.SamplingParams(max_tokens=30, temperature=0)
    for turn in range(2):
        messages.append({"role": "user", "content": "again"})
        _answer(llm, messages, wish)
        assert len(messages) == 3 + 2 * turn and messages[-1]["role"] == "assistant"
        assert messages[-1]["content"] in capsys.readouterr().out
    assert llm.engine.stats.cached_tokens >= 16
    messages.append({"role": "user", "content": "words " * 600})
    _answer(llm, messages, wish)
    assert messages[-1]["role"] == "assistant" and "shorten it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "quantize", [*(pytest.param(q, marks=pytest.mark.slow) for q in ("fp8", "int8")), "int4"]
)
def test_quantized_weights(folder: Path, quantize: str) -> None:
    done = dsv3("generate", str(folder), "--prompt", "some", "--max-tokens", "6", "--quantize", quantize)
    assert done.returncode == 0, done.stderr
    llm = package.LLM(folder, quantize=quantize, draft_tokens=1)
    wanted = llm.generate(["some"], package.SamplingParams(max_tokens=6, temperature=0))[0].text
    assert done.stdout == wanted.replace("\r\n", "\n").replace("\r", "\n") + "\n"
    done = dsv3("chat", str(folder), "--max-tokens", "3", "--quantize", quantize, said="some words\n/exit\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give either --prompt or --input"),
        (("--prompt", "x", "--input", "y"), "give either --prompt or --input"),
        (("--prompt", "x", "--output", "y"), "--input and --output belong together"),
        (("--input", "nothing", "--output", "y"), "input nothing does not exist"),
        (("--prompt", "x", "--quantize", "int5"), "quantize ('int5') is unknown"),
        (("--prompt", "x", "--top-p", "2"), "top_p (2.0) must be from 0 to 1"),
    ],
)
def test_mistakes(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    done = dsv3("generate", str(folder), *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
