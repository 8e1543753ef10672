"""Real servers over tiny random models: the API is spoken to through a socket, as clients do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import openai
import pytest

from dsv3.data.tokenizer import Tokenizer, train
from dsv3.serve.api.app import create_app
from dsv3.serve.api.server import Listener, bind
from dsv3.serve.api.settings import Settings
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options
from tests.model.build import tiny_model


class Api:
    """A server in a thread of this process."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, **options: int):
        model = tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1)
        options = {"draft_tokens": 1, "max_batch": 4, "max_length": 512, "cache_tokens": 4096, **options}
        self.engine = Engine(model, tokenizer, Options(**options))  # type: ignore[arg-type]
        self.app = create_app(self.engine, settings)
        self.worker = self.app.state.worker
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.port = self._socket.getsockname()[1]
        self.listener = Listener(self.app, settings.drain_seconds)
        self.thread = threading.Thread(target=self.listener.run, args=([self._socket],), daemon=True)
        self.thread.start()
        self.until(lambda: self.listener.started)
        self.http = httpx2.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def until(self, true: Callable[[], bool], seconds: float = 20) -> None:
        """Wait for something to become true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)

    def idle(self) -> None:
        """Wait until nothing is open, and see that nothing is left behind."""
        self.until(lambda: not self.worker.jobs and not self.engine.busy)
        self.until(lambda: self.engine.blocks.used == 0)
        assert self.worker.open_answers == 0 and not self.worker._of

    def slow(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
        """Make each step of the engine take a little while."""
        step = self.engine.step

        def slowly() -> object:
            time.sleep(seconds)
            return step()

        monkeypatch.setattr(self.engine, "step", slowly)

    def end(self) -> None:
        """Stop it."""
        self.http.close()
        self.openai.close()
        self.listener.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small one, with every control token."""
    return train(["some words to learn from and to say again, Paris or Rome"] * 9, 340)


@pytest.fixture(scope="session")
def api(tokenizer: Tokenizer) -> Iterator[Api]:
    """A server with the settings as they come."""
    found = Api(tokenizer, Settings(model_name="tiny"))
    yield found
    found.end()


@pytest.fixture
def serving(tokenizer: Tokenizer) -> Callable[..., object]:
    """A server of one's own: settings, and options of the engine in ``options``."""

    @contextmanager
    def start(options: dict[str, int] | None = None, **settings: object) -> Iterator[Api]:
        found = Api(tokenizer, Settings(**settings), **(options or {}))  # type: ignore[arg-type]
        try:
            yield found
        finally:
            found.end()

    return start
