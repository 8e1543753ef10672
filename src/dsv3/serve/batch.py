"""Prompts from a JSONL file, answers to another: every line checked first, resumed after a kill.

An input line is an object with ``prompt``, perhaps ``suffix`` (fill in the middle), and any field of
:class:`SamplingParams` that differs from the command line's. Answers are collected in ``OUTPUT.part`` as they
come, each line whole or absent; when all are there, ``OUTPUT`` is written in the order of the input, at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dsv3.common.errors import UserError, nearest
from dsv3.common.files import write_atomic
from dsv3.common.progress import Progress
from dsv3.serve.llm import LLM
from dsv3.serve.params import SamplingParams
from dsv3.serve.sequence import Sequence
from dsv3.serve.updates import usage_of

FIELDS = {field.name for field in fields(SamplingParams)}
QUEUED = 4  # requests in the engine, as a multiple of its batch: the rest waits in the file


@dataclass(frozen=True)
class Request:
    """A line of the input file; the first is number 1."""

    line: int
    prompt: str
    suffix: str | None
    params: SamplingParams


def read_requests(path: Path, params: SamplingParams) -> list[Request]:
    """What the lines of an input file ask for; :class:`UserError` with file and line.

    A line without a seed of its own gets that of ``params`` plus its number: equal prompts get different
    answers, and going on after a kill changes none.
    """
    if not path.is_file():
        raise UserError(f"input {path} does not exist")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            tree = json.loads(line.decode())
        except ValueError as error:  # UnicodeDecodeError is one
            raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("prompt"), str):
            raise UserError(f'{where}: must be an object with a text "prompt"')
        if not isinstance(tree.get("suffix"), (str, type(None))):
            raise UserError(f"{where}: suffix ({tree['suffix']!r}) must be a text")
        own = {key: value for key, value in tree.items() if key not in ("prompt", "suffix")}
        unknown = next((key for key in own if key not in FIELDS), None)
        if unknown is not None:
            raise UserError(f"{where}: {unknown!r} is unknown{nearest(unknown, FIELDS)}")
        try:
            bias = own.get("logit_bias")
            if isinstance(bias, dict):  # JSON's keys are texts
                own["logit_bias"] = {int(key) if key.isdigit() else key: x for key, x in bias.items()}
            own.setdefault("seed", (params.seed or 0) + number)
            found.append(Request(number, tree["prompt"], tree.get("suffix"), replace(params, **own)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not found:
        raise UserError(f"input {path} has no lines")
    return found


class Part:
    """The answers so far: a first line that says of what, then a line an answer."""

    def __init__(self, path: Path, job: str):
        self.path = path
        self.done: dict[int, dict[str, Any]] = {}
        kept = json.dumps({"job": job}).encode() + b"\n"
        if path.exists():
            whole = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break was cut off
            if whole:
                if json.loads(whole[0]).get("job") != job:
                    raise UserError(f"{path} is of another input or other options: delete it, or give those")
                self.done = {found["line"]: found for found in map(json.loads, whole[1:])}
                kept = b"".join(line + b"\n" for line in whole)
        write_atomic(path, kept)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()

    def add(self, answer: dict[str, Any]) -> None:
        """Append an answer; it is on the disk when this returns."""
        self.done[answer["line"]] = answer
        self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Done, or given up."""
        self._file.close()


def generate_file(llm: LLM, source: Path, target: Path, params: SamplingParams, model: str = "") -> int:
    """Answer every line of ``source`` into ``target``; returns how many.

    A line of ``target``: ``line`` (its number in ``source``), ``prompt``, ``text``, ``finish_reason``,
    ``usage``, and if asked for ``logprobs``, ``prompt_logprobs`` and, with ``n`` above 1, ``texts`` and
    ``finish_reasons``.
    ``model`` names the model, so that another one does not go on with this one's answers.

    Raises :class:`UserError` before any work for a bad line, a target that exists or an unfinished one of
    another job.
    """
    if target.exists():
        raise UserError(f"output {target} already exists; choose another name or delete it")
    if not target.absolute().parent.is_dir():
        raise UserError(f"the folder of output {target} does not exist")
    requests = read_requests(source, params)
    prompts = {request.line: llm.encode(request.prompt, request.suffix) for request in requests}
    for request in requests:
        try:
            llm.engine.check(prompts[request.line], request.params)
        except UserError as error:
            raise UserError(f"{source}:{request.line}: {error}") from None
    said = repr((model, params, llm.engine.options)).encode()
    part = Part(
        target.with_name(target.name + ".part"), hashlib.sha256(source.read_bytes() + said).hexdigest()
    )
    left = [request for request in requests if request.line not in part.done]
    try:
        with Progress("generate", len(requests), "prompts", done=len(part.done)) as bar:
            for request, sequences in _answers(llm, prompts, left):
                part.add(_line(request, sequences))
                bar.advance(1)
    finally:
        part.close()
    lines = [json.dumps(part.done[request.line], ensure_ascii=False) for request in requests]
    write_atomic(target, "\n".join(lines) + "\n")
    part.path.unlink()
    return len(lines)


def _answers(
    llm: LLM, prompts: dict[int, list[int]], requests: list[Request]
) -> Iterator[tuple[Request, list[Sequence]]]:
    """Requests with their answers, as they are finished."""
    engine, waiting = llm.engine, iter(requests)
    opened: dict[str, tuple[Request, list[Sequence]]] = {}
    try:
        while True:
            for request in islice(waiting, QUEUED * engine.options.max_batch - len(opened)):
                name = engine.add_request(prompts[request.line], request.params)
                opened[name] = request, engine.requests[name]
            if not opened:
                return
            for update in engine.step():
                if update.usage is not None:
                    yield opened.pop(update.request_id)
    finally:
        for name in opened:
            engine.abort(name)


def _line(request: Request, sequences: list[Sequence]) -> dict[str, Any]:
    first = sequences[0]
    found: dict[str, Any] = {
        "line": request.line,
        "prompt": request.prompt,
        "text": first.text.text,
        "finish_reason": first.finish_reason,
        "usage": asdict(usage_of(sequences)),
    }
    if first.params.logprobs is not None:
        found["logprobs"] = [asdict(token) for token in first.logprobs]
    if first.prompt_logprobs is not None:
        found["prompt_logprobs"] = [score and asdict(score) for score in first.prompt_logprobs]
    if len(sequences) > 1:
        found["texts"] = [sequence.text.text for sequence in sequences]
        found["finish_reasons"] = [sequence.finish_reason for sequence in sequences]
    return found
