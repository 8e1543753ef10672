"""``dsv3 bench serve`` from end to end, and that its soak test can fail."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

import dsv3
from dsv3.bench import serve, soak
from dsv3.bench.load import Target
from dsv3.bench.server import Server
from dsv3.cli.main import app
from dsv3.common.errors import Failure, UserError
from dsv3.data.tokenizer import train
from dsv3.serve.api.settings import Settings
from tests.model.build import tiny_model
from tests.serve.api.conftest import Api

WORDS = ["some words to learn from and to say again, Paris or Rome"] * 9
TEXT = "".join(f"word {i * i} of {i} " for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with an MTP module, and its tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "model"
    tokenizer = train(WORDS, 340)
    dsv3.save(tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1), folder)
    tokenizer.save(folder)
    return folder


def load(**changes: Any) -> serve.Load:
    settings = dict(
        rate=20.0,
        seconds=1.0,
        requests=6,
        prompt_length=90,
        prefix_share=0.6,
        max_tokens=8,
        seed=0,
        text=TEXT,
    )
    return serve.Load(**{**settings, **changes})


def test_a_running_server_is_taken_as_it_is(tmp_path: Path) -> None:
    api = Api(train(WORDS, 340), Settings())
    try:
        result = serve.bench(Target("127.0.0.1", api.port), load(), rounds=2)
    finally:
        api.end()
    ours = result["ours"]
    assert (ours["answered"], ours["requests"], ours["errors"]) == (12, 12, {})
    assert ours["completion_tokens"] == 12 * 8
    assert 0.2 < ours["cache_hit_rate"] < 0.7
    assert ours["acceptance_rate"] is not None
    assert result["ratios"] == {} and result["peers"] == {}
    assert 0 < ours["time_to_first_token"]["p50"] <= ours["end_to_end"]["p50"]
    assert "answered, of" in serve.report(result)
    serve.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_drafts_on_beside_off(folder: Path) -> None:
    options = [
        "--requests",
        "3",
        "--rate",
        "20",
        "--rounds",
        "1",
        "--max-tokens",
        "6",
        "--prompt-length",
        "60",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dsv3", "bench", "serve", str(folder), *options, "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ours, theirs = result["ours"], result["peers"]["mtp off"]
    assert ours["name"] == "mtp 1" and ours["acceptance_rate"] is not None
    assert theirs["acceptance_rate"] is None
    assert result["same_answers"] == {"of": 3, "same": 3}
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    assert result["ratios"]["mtp off:tokens_per_second"] == pytest.approx(ratio)
    assert result["machine"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "one of the two"),
        (["nowhere"], "no config.json"),
        (["--url", "http://10.1.2.3:80"], "not this machine"),
        (["--url", "http://127.0.0.1:9", "--rate", "0"], "--rate"),
        (["--url", "http://127.0.0.1:9", "--prefix-share", "2"], "--prefix-share"),
        (["--url", "http://127.0.0.1:9", "--seconds", "0.0001"], "--seconds"),
        (["--url", "http://127.0.0.1:9", "--text", "nowhere"], "--text"),
        (["--url", "http://127.0.0.1:9", "--soak", "1"], "--soak"),
        (["--url", "http://127.0.0.1:9", "--plot", "nowhere/plot.png"], "--plot"),
        (["--url", "http://127.0.0.1:9", "--prompt-length", "99999999"], "--prompt-length"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments: list[str], word: str) -> None:
    found = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert isinstance(found.exception, UserError) and found.exception.exit_code == 2
    assert word in str(found.exception)


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"ended before it answered: dsv3: .*config\.json"), Server(tmp_path):
        pass


def test_a_short_soak(folder: Path) -> None:
    result = soak.bench(folder, minutes=4 / 60)
    assert result["failed"] == [], soak.report(result)
    assert sum(result["requests"].values()) > 20
    assert "held: no cache block is held" in soak.report(result)


def test_the_check_up_can_fail() -> None:
    after = {"dsv3_requests_running": 0.0, "dsv3_requests_waiting": 0.0, "dsv3_cache_blocks_used": 0.0}
    assert all(soak.check_up(False, after, 100, 104, True).values())

    def failed(*arguments: Any) -> list[str]:
        return [name for name, holds in soak.check_up(*arguments).items() if not holds]

    assert failed(True, after, 100, 100, True) == ["every request got what it deserves"]
    assert failed(False, {**after, "dsv3_requests_waiting": 1}, 100, 100, True) == ["no request is left"]
    assert failed(False, {**after, "dsv3_cache_blocks_used": 2}, 1, 1, True) == ["no cache block is held"]
    assert failed(False, after, 100, 106, True) == ["memory is flat"]
    assert failed(False, after, 100, 100, False) == ["the idle server answers as before"]
    assert soak.by_quarter([1, 1, 2, 2, 9, 9, 3, 3]) == (2, 3)


class Agreeable(BaseHTTPRequestHandler):
    """Takes whatever is sent for good, and answers it with nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"choices": [], "error": {"message": "x"}}')

    do_GET = do_POST


@pytest.fixture
def agreeable() -> Iterator[Target]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Agreeable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Target("127.0.0.1", server.server_address[1])
    server.shutdown()
    server.server_close()


def test_the_clients_see_what_is_wrong(agreeable: Target) -> None:
    found = soak.Soak(agreeable, seed=0)
    found.expected = [""] * soak.PROMPTS
    for function in (found._good, found._chat, found._sampled, found._oversized):
        assert function(Random(0)).startswith("wrong"), function
    posts = [case for case in soak.BROKEN if case[1] == "POST"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "BROKEN", posts)
        assert found._bad(Random(0)).startswith("wrong: 200")
    with pytest.raises(Failure, match="idle server does not answer"):
        found.idle_answers()
