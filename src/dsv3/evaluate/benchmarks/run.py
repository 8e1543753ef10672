"""Benchmarks run through the engine: a folder with a line a question, taken up again after a kill.

``OUT/TASK.jsonl`` begins with a line that names the model; each further line is a question with what the
model gave and its scores. ``OUT/results.json`` has the means.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsv3.checkpoint.hf import check_quantize
from dsv3.common.errors import UserError
from dsv3.common.files import write_atomic, write_json
from dsv3.common.progress import Progress
from dsv3.evaluate.benchmarks.base import Benchmark, Question
from dsv3.evaluate.benchmarks.likelihood import Likelihood, likelihoods, pair
from dsv3.evaluate.benchmarks.statistics import mean
from dsv3.serve.llm import LLM
from dsv3.serve.params import SamplingParams

ROUND = 32  # questions between two writes
SAMPLED = 1 << 16  # bytes of each end of a weight file that enter the fingerprint

Record = dict[str, Any]


def describe(folder: Path, quantize: str | None = None) -> Record:
    """What names a model in results. ``fingerprint``: 16 hex digits of its config and both ends of each
    weight file: training changes every tensor, so that tells two models apart, even 671B in a second.

    Raises :class:`UserError` for a folder that is no model, or no such format of it.
    """
    check_quantize(folder, quantize)
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for start in (0, max(0, size - SAMPLED)):
                file.seek(start)
                found.update(file.read(SAMPLED))
    return {"folder": str(folder.resolve()), "quantize": quantize, "fingerprint": found.hexdigest()[:16]}


class Kept:
    """The records of one benchmark so far, by digest of the question."""

    def __init__(self, path: Path, head: Record):
        self.path = path
        self.records: dict[str, Record] = {}
        lines = [json.dumps(head).encode()]
        if path.exists():
            found_head, records = read_records(path)
            if found_head != head:
                raise UserError(
                    f"{path} is of another model or setting ({found_head}, not {head}); choose another --out"
                    " or delete it"
                )
            self.records = {record["digest"]: record for record in records}
            lines += [json.dumps(record, ensure_ascii=False).encode() for record in records]
        write_atomic(path, b"".join(line + b"\n" for line in lines))

    def add(self, records: Sequence[Record]) -> None:
        """Append; they are on the disk when this returns."""
        with open(self.path, "ab") as file:
            for record in records:
                self.records[record["digest"]] = record
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_records(path: Path) -> tuple[Record, list[Record]]:
    """The first line and the records; a last line cut off by a kill is left out."""
    try:
        head, *records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no file of answers: {error}") from None
    return head, records


def run(llm: LLM, benchmarks: Sequence[Benchmark], out: Path, model: Record) -> Record:
    """Ask every question that has no answer in ``out`` yet; returns what ``results.json`` then holds.

    ``model``: what names the model (JSON values). Raises :class:`UserError` before any work where ``out``
    holds another model's answers.
    """
    for task in benchmarks:
        if not task.questions:
            raise UserError(f"task {task.name} has no questions")
    out.mkdir(parents=True, exist_ok=True)
    kept = {
        task.name: Kept(out / file_name(task.name), {"task": task.name, "model": model})
        for task in benchmarks
    }
    left = {
        task.name: [q for q in task.questions if q.digest() not in kept[task.name].records]
        for task in benchmarks
    }
    total = sum(len(task.questions) for task in benchmarks)
    with Progress("eval", total, "questions", done=total - sum(map(len, left.values()))) as progress:
        for task in benchmarks:
            progress.note(task.name)
            for few in _rounds(left[task.name]):
                kept[task.name].add(_rank(llm, few) if task.judge is None else _answer(llm, task, few))
                progress.advance(len(few))
    results = {
        "model": model,
        "tasks": {
            task.name: summary(task, [kept[task.name].records[q.digest()] for q in task.questions])
            for task in benchmarks
        },
    }
    write_json(out / "results.json", results)
    return results


def file_name(task: str) -> str:
    """Where a task's records lie; names may hold slashes and colons."""
    return task.replace("/", "-").replace(":", "-") + ".jsonl"


def summary(task: Benchmark, records: Sequence[Record]) -> Record:
    """Means over all questions, the chosen metric first.

    ``truncated``: questions whose prompt's beginning did not fit; ``unfinished``: answers cut off.
    """
    names = list(records[0]["scores"])
    names.sort(key=lambda name: name != task.metric)
    found: Record = {"metric": task.metric, "n": len(records), "shots": task.shots, "note": task.note}
    for name in names:
        one = mean([record["scores"][name] for record in records])
        found[name] = one.value
        found[f"{name}_stderr"] = one.stderr
    found["truncated"] = sum(record["truncated"] for record in records)
    if task.judge is not None:
        found["unfinished"] = sum(record["finish_reason"] == "length" for record in records)
    return found


def _rounds(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), ROUND):
        yield questions[start : start + ROUND]


def _rank(llm: LLM, questions: Sequence[Question]) -> list[Record]:
    assert llm.tokenizer is not None
    pairs = [pair(llm.tokenizer, *choice) for question in questions for choice in question.choices]
    found = iter(likelihoods(llm, pairs))
    return [_ranked(question, [next(found) for _ in question.choices]) for question in questions]


def _ranked(question: Question, found: list[Likelihood]) -> Record:
    """``acc``: the likeliest choice is right; ``acc_norm``: the likeliest a character; ``bits_per_byte``: of
    the right choice. A single choice counts as right where every token of it is the likeliest."""
    gold, texts = question.gold, [continuation for _, continuation in question.choices]
    raw = [one.logprob for one in found]
    norm = [one.logprob / max(1, len(text.lstrip())) for one, text in zip(found, texts)]
    contexts = [context for context, _ in question.choices]
    record: Record = {
        "id": question.id,
        "digest": question.digest(),
        "prompt": contexts[0] if len(set(contexts)) == 1 else contexts,
        "choices": texts,
        "gold": gold,
        "logprobs": raw,
        "greedy": [one.greedy for one in found],
        "chosen": raw.index(max(raw)),
        "truncated": any(one.truncated for one in found),
    }
    if len(found) == 1:
        scores = {"acc": float(found[0].greedy)}
    else:
        right = (float(values.index(max(values)) == gold) for values in (raw, norm))
        scores = dict(zip(("acc", "acc_norm"), right))
    scores["bits_per_byte"] = -raw[gold] / math.log(2) / max(1, len(texts[gold].encode()))
    return {**record, "scores": scores}


def _answer(llm: LLM, task: Benchmark, questions: Sequence[Question]) -> list[Record]:
    """Greedy answers. A prompt that leaves no room for one loses its beginning, as in lm-eval."""
    assert llm.tokenizer is not None and task.judge is not None
    prompts = [question.token_ids(llm.tokenizer) for question in questions]
    room = llm.engine.max_length - min(task.max_tokens, llm.engine.max_length // 2)
    outs = llm.generate(
        [prompt[-room:] for prompt in prompts],
        SamplingParams(max_tokens=task.max_tokens, temperature=0.0, stop=task.stop),
    )
    scores = task.judge(questions, [out.text for out in outs])
    return [
        {
            "id": question.id,
            "digest": question.digest(),
            "prompt": question.prompt,
            "reference": question.reference,
            "answer": out.text,
            "finish_reason": out.finish_reason,
            "tokens": len(out.token_ids),
            "truncated": len(prompt) > room,
            "scores": score,
        }
        for question, prompt, out, score in zip(questions, prompts, outs, scores)
    ]
