"""A tiny random model with a tokenizer, as a folder and ready to answer."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsv3
from dsv3.data.tokenizer import train
from dsv3.serve.llm import LLM
from tests.model.build import tiny_model

TEXT = "What is 3 + 4? Question: which of them is right? Answer: the first one, def f(x): return x. " * 9


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "model"
    tokenizer = train([TEXT], 340)
    dsv3.save(tiny_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=2), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    return LLM(folder, cache_tokens=4096)
