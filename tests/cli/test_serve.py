"""``dsv3 serve`` as a process: started, asked, and stopped by a signal in the middle of an answer."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

import dsv3 as package
from dsv3.data.tokenizer import train
from tests.model.build import tiny_model

LONG = {
    "messages": [{"role": "user", "content": "some words"}], "max_tokens": 1500, "stream": True,
    "logit_bias": {"1": -100},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "quick" / "model"
    tokenizer = train(["some words to learn from and to say again"] * 9, 330)
    package.save(tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1), folder)
    tokenizer.save(folder)
    return folder


@contextmanager
def running(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own process, and where it listens."""
    command = [sys.executable, "-m", "dsv3", "serve", str(folder), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found is not None, line + process.stderr.read()  # type: ignore[union-attr]
        url = found[0]
        assert process.stdout.readline().startswith(f"curl {url}/v1/chat/completions ")
        for _ in range(200):
            try:
                httpx2.get(f"{url}/health")
                break
            except httpx2.ConnectError:
                time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_a_stream_finishes_after_sigterm(folder: Path) -> None:
    with running(folder, "--drain-seconds", "60", "--model-name", "mine") as (process, url):
        assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine"
        assert "<html" in httpx2.get(url).text
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while httpx2.get(f"{url}/health").json()["status"] != "draining":
                pass
            refused = httpx2.post(f"{url}/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            text = "\n".join(lines)
        assert '"finish_reason":"length"' in text and text.rstrip().endswith("data: [DONE]")
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
        records = [json.loads(line) for line in log.splitlines()]
        assert any(record["message"] == "draining" for record in records)
        assert any(record.get("completion_tokens") == 1500 for record in records)


def test_a_stream_is_cut_when_its_time_is_over(folder: Path) -> None:
    with running(folder, "--drain-seconds", "0") as (process, url):
        assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "quick"  # the run's name
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert '"finish_reason":"insufficient_system_resource"' in text
        assert text.rstrip().endswith("data: [DONE]")
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "{taken}"], "--port ({taken})"),
        (["--api-key-file", "/nowhere/keys"], "--api-key-file"),
        (["--log-level", "loud"], "--log-level ('loud')"),
        (["--max-batch-tokens", "2"], "max_batch_tokens (2)"),
        (["--max-length", "99999"], "--max-length (99999)"),
        (["--cors-origin", "example"], "cors_origins ('example')"),
        (["--cache-dtype", "int3"], "cache_dtype ('int3')"),
    ],
)
def test_bad_options_are_one_line(
    folder: Path,
    options: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dsv3.cli.main import main

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dsv3.checkpoint.hf.load", load)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        given = [option.format(taken=taken) for option in options]
        monkeypatch.setattr(sys, "argv", ["dsv3", "serve", str(folder), *given])
        with pytest.raises(SystemExit) as raised:
            main()
    error = capsys.readouterr().err
    assert raised.value.code == 2
    assert error.count("\n") == 1 and words.format(taken=taken) in error
