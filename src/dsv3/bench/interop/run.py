"""Export a model, ask every oracle that is installed, keep what each found, and write the page.

What an oracle found stays in ``OUT/results.json`` until it is asked again: a run that was stopped goes on
with the others, and one on another machine adds what is installed there.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import dsv3
from dsv3.bench import llama_cpp
from dsv3.bench.interop import oracles
from dsv3.bench.interop.case import FACTOR, LONG, ORIGINAL, PROMPTS, TOKENS, Case, Finding, held_out_texts
from dsv3.bench.machine import commit, machine, today
from dsv3.checkpoint.hf import tokenizer_files
from dsv3.common.errors import UserError
from dsv3.common.files import write_atomic, write_json
from dsv3.common.progress import Progress

PAGE = Path("docs/interop.md")

HEAD = f"""\
# In other people's software

A trained model of ours, written by `dsv3.save`, in the software of others: what each does with it, beside
what we do. This page is written by `dsv3 bench interop`; nothing on it is typed by hand.

```
dsv3 bench interop                                   # runs/quickstart/model, what is installed
dsv3 bench interop MODEL --llama-cpp LLAMA_CPP       # another model; llama.cpp, built, with llama-completion
dsv3 bench interop --only trl                        # one of them again; the other rows stay
```

Prompts are the beginnings of {PROMPTS} held-out documents of each source; answers are {TOKENS} tokens,
greedy, all in FP32. Questions for lm-eval are cut from the same documents: what follows here, or elsewhere.
"With YaRN": the same weights, extended {FACTOR} times from {ORIGINAL} tokens in their config.json alone, and
prompts of {LONG} characters. mscale and mscale_all_dim are equal there: llama.cpp reads the second only, and
answers otherwise where they differ.

transformers looks for MTP modules at layer 61 only, and is told where ours is; llama.cpp's converter knows
tokenizers by a hash over their ids, and is told that ours cuts text as V3's does.

"""


@dataclass(frozen=True)
class Oracle:
    """``check`` asks it; ``package``: what must be installed, None for a program; ``install``: how."""

    check: Callable[[Case], list[Finding]]
    package: str | None
    install: str


ORACLES = {
    "transformers": Oracle(oracles.transformers, "transformers", "pip install transformers"),
    "llama.cpp": Oracle(oracles.llama, None, "build it with llama-completion, then --llama-cpp FOLDER"),
    "lm-eval": Oracle(oracles.lm_eval, "lm-eval", "pip install 'dsv3[eval]'"),
    "trl": Oracle(oracles.trl, "trl", "pip install 'dsv3[dev]'"),
    "openai": Oracle(oracles.openai, "openai", "pip install 'dsv3[distill]'"),
}


def bench(
    model: Path, data: Path, out: Path, llama: Path | None = None, only: tuple[str, ...] = (),
    page: Path = PAGE,
) -> dict[str, Any]:  # fmt: skip
    """Ask all, or those of ``only``; what they and those asked before found, by name.

    Raises :class:`UserError` for a model or data that are not there, before anything is written.
    """
    for name in only:
        if name not in ORACLES:
            raise UserError(f"--only ({name}) is no oracle; there are {', '.join(ORACLES)}")
    if not (model / "config.json").is_file():
        raise UserError(f"{model} holds no config.json; train one with dsv3 quickstart, or name another")
    texts = held_out_texts(data)
    if llama is not None:
        llama_cpp.program(llama, "llama-completion")
    results = read(out)
    folder = export(model, out / "model")
    case = Case(folder, texts, llama, out)
    asked = [name for name in ORACLES if not only or name in only]
    with Progress("bench interop", len(asked), "oracles") as progress:
        for name in asked:
            progress.note(name)
            results[name] = ask(name, case, str(model))
            write_json(out / "results.json", results)
            progress.advance(1)
    results = {name: results[name] for name in ORACLES if name in results}
    write_atomic(page, HEAD + table(results))
    return results


def read(out: Path) -> dict[str, Any]:
    """What was found before."""
    path = out / "results.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, and all are asked again") from None


def export(model: Path, folder: Path) -> Path:
    """The model in FP32 as a fresh Hugging Face folder, by our own save."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    dsv3.save(dsv3.load(model, dtype=torch.float32), folder, tokenizer_files=tokenizer_files(model))
    return folder


def version_of(name: str, llama: Path | None) -> str | None:
    """The oracle's version, None where it is not installed."""
    package = ORACLES[name].package
    if package is not None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None
    if llama is None:
        return None
    program = llama_cpp.program(llama, "llama-completion")
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version:")]
    return said[0].removeprefix("version:").strip() if said else "unknown"


def ask(name: str, case: Case, model: str) -> dict[str, Any]:
    """What one of them found; what it stumbles over is a finding too."""
    version = version_of(name, case.llama)
    findings: list[Finding] = []
    if version is not None:
        try:
            findings = ORACLES[name].check(case)
        except Exception as error:  # other people's code: whatever it raises is its answer
            said = str(error).strip().splitlines() or ["no message"]
            findings = [Finding("ran", False, f"{type(error).__name__}: {said[0]}")]
    return {
        "version": version, "model": model, "date": today(), "commit": commit(), "machine": machine("cpu"),
        "findings": [asdict(finding) for finding in findings],
    }  # fmt: skip


def failed(results: dict[str, Any]) -> list[str]:
    """The oracles that found something else than we do."""
    return [name for name, one in results.items() if not all(f["agrees"] for f in one["findings"])]


def table(results: dict[str, Any]) -> str:
    """A row a finding, as Markdown."""
    header = ("software", "version", "what", "", "figure", "model", "date", "commit", "where")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, one in results.items():
        where = f"{one['machine']['cores']} cores, {one['machine']['cpu']}"
        tail = (one["model"], one["date"], one["commit"], where)
        if one["version"] is None:
            rows = [("", "all", "not installed", ORACLES[name].install)]
        else:
            rows = [
                (one["version"], f["what"], "agrees" if f["agrees"] else "**differs**", f["figure"])
                for f in one["findings"]
            ]
        lines += [f"| {' | '.join((name, *row, *tail))} |" for row in rows]
    return "\n".join(lines) + "\n"


def report(results: dict[str, Any]) -> str:
    """The findings, a line each."""
    lines = []
    for name, one in results.items():
        if one["version"] is None:
            lines.append(f"{name:<14} not installed: {ORACLES[name].install}")
        for finding in one["findings"]:
            verdict = "agrees" if finding["agrees"] else "DIFFERS"
            lines.append(
                f"{name:<14} {one['version'][:12]:<13} {finding['what']:<34} {verdict:<8} {finding['figure']}"
            )
    return "\n".join(lines)
