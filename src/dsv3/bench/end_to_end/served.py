"""One question to ``dsv3 serve``, through its API."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

from dsv3.bench.server import Server
from dsv3.common.errors import Failure


def ask_the_server(model: Path, question: str, max_tokens: int) -> dict[str, Any]:
    """Start a server on ``model``, ask it ``question`` greedily, stop it; raises :class:`Failure`."""
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens}
    with Server(model) as server:
        connection = server.target.connect()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), server.target.headers)
            response = connection.getresponse()
            status, said = response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"the server of {model} gave no answer: {error}") from None
        finally:
            connection.close()
    if status != 200:
        raise Failure(f"the server of {model} answers with status {status}: {said[:200]}")
    found = json.loads(said)
    answer = found["choices"][0]["message"]["content"]
    return {"model": str(model), "question": question, "answer": answer, "usage": found["usage"]}
