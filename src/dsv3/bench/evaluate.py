"""One model scored four ways on the same questions: our own runner, lm-evaluation-harness over our engine,
the same over HTTP (``dsv3 serve``), and lm-evaluation-harness on the folder with transformers.

All four read the same prompts: log-likelihoods have to agree to rounding, accuracies to the last digit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsv3.bench.machine import machine
from dsv3.bench.server import Server
from dsv3.common.errors import UserError
from dsv3.evaluate.benchmarks.base import Benchmark
from dsv3.evaluate.benchmarks.run import read_records, run
from dsv3.serve.llm import LLM

OURS = "dsv3 eval"
PEERS = ("lm-eval --model dsv3", "lm-eval --model local-completions", "lm-eval --model hf")
TOLERANCE = 1e-4  # nats of a log-likelihood
BATCH = 8

Scores = dict[str, Any]  # of a task: acc, acc_norm, and logprobs, a list of lists


def agree(folder: Path, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """Scores of each way on each benchmark, largest difference of a log-likelihood, and whether all agree.

    Raises :class:`UserError` where lm-eval is not installed or a benchmark is not ranked after one context.
    """
    for task in benchmarks:
        if any(len({context for context, _ in question.choices}) != 1 for question in task.questions):
            raise UserError(
                f"task {task.name} is not choices after one context; take piqa, arc_easy or openbookqa"
            )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; pip install 'dsv3[eval]'")
    llm = LLM(folder, dtype="float32")
    found: dict[str, dict[str, Scores]] = {}
    with tempfile.TemporaryDirectory() as scratch, _offline(Path(scratch)):
        out = Path(scratch) / "ours"
        results = run(llm, benchmarks, out, {})["tasks"]
        found[OURS] = {
            task.name: {
                "acc": results[task.name]["acc"],
                "acc_norm": results[task.name]["acc_norm"],
                "logprobs": [record["logprobs"] for record in read_records(out / f"{task.name}.jsonl")[1]],
            }
            for task in benchmarks
        }
        for peer in PEERS:
            found[peer] = _harness(peer, folder, llm, benchmarks, Path(scratch))
    return _compared(found, [task.name for task in benchmarks])


def _compared(found: dict[str, dict[str, Scores]], names: Sequence[str]) -> dict[str, Any]:
    """Drop the single log-likelihoods for their largest difference from ours."""
    largest = {}
    for peer in PEERS:
        for name in names:
            ours, theirs = ([x for row in found[way][name]["logprobs"] for x in row] for way in (OURS, peer))
            gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
            largest[f"{peer}:{name}"] = max(gaps, key=lambda gap: (math.isnan(gap), gap))
    scores = {
        way: {name: {key: found[way][name][key] for key in ("acc", "acc_norm")} for name in names}
        for way in found
    }
    same = all(scores[peer] == scores[OURS] for peer in PEERS)
    return {
        "scores": scores,
        "largest_difference": largest,
        "agree": same and all(gap <= TOLERANCE for gap in largest.values()),
        "machine": machine(),
    }


@contextlib.contextmanager
def _offline(scratch: Path) -> Iterator[None]:
    """lm-eval's libraries look for nothing outside and keep nothing."""
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "cache"),
           "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def export(benchmarks: Sequence[Benchmark], folder: Path) -> None:
    """The benchmarks as tasks of lm-eval: a YAML and a JSONL each, prompts already written."""
    folder.mkdir(exist_ok=True)
    for task in benchmarks:
        rows = [
            {"number": number, "context": question.choices[0][0], "gold": question.gold,
             "choices": [text.removeprefix(" ") for _, text in question.choices]}
            for number, question in enumerate(task.questions)
        ]  # fmt: skip
        data = folder / f"{task.name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {
            "task": f"dsv3_{task.name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                            for name in ("acc", "acc_norm")],
        }  # fmt: skip
        (folder / f"{task.name}.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML


def _harness(
    peer: str, folder: Path, llm: LLM, benchmarks: Sequence[Benchmark], scratch: Path
) -> dict[str, Scores]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    export(benchmarks, scratch / "tasks")
    manager = TaskManager(include_path=str(scratch / "tasks"), include_defaults=False)
    with _model(peer, folder, llm) as model:
        results = simple_evaluate(
            model=model,
            tasks=[f"dsv3_{task.name}" for task in benchmarks],
            task_manager=manager,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    assert results is not None
    return {
        task.name: _scores(results["results"], results["samples"], f"dsv3_{task.name}") for task in benchmarks
    }


def _scores(results: dict[str, Any], samples: dict[str, Any], name: str) -> Scores:
    rows = sorted(samples[name], key=lambda row: row["doc"]["number"])
    return {
        "acc": float(results[name]["acc,none"]),
        "acc_norm": float(results[name]["acc_norm,none"]),
        "logprobs": [[float(logprob) for logprob, _ in row["filtered_resps"]] for row in rows],
    }


@contextlib.contextmanager
def _model(peer: str, folder: Path, llm: LLM) -> Iterator[Any]:
    """lm-eval's model of one of :data:`PEERS`."""
    if peer == PEERS[0]:
        from dsv3.evaluate.benchmarks.harness import Dsv3LM

        yield Dsv3LM(llm=llm)
    elif peer == PEERS[1]:
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        with Server(folder, ["--model-name", "judged"]) as server:
            yield LocalCompletionsAPI(
                base_url=f"http://{server.target.host}:{server.target.port}/v1/completions",
                model="judged",
                tokenizer=str(folder),
                tokenizer_backend="huggingface",
                batch_size=BATCH,
                max_length=llm.engine.max_length,
            )
    else:
        from lm_eval.models.huggingface import HFLM

        yield HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=BATCH)


def report(result: dict[str, Any]) -> str:
    """The scores of each way, and how far apart the likelihoods are."""
    lines = ["acc / acc_norm".ljust(36) + "".join(name.rjust(24) for name in result["scores"][OURS])]
    for way, tasks in result["scores"].items():
        cells = [f"{one['acc']:.6f} / {one['acc_norm']:.6f}" for one in tasks.values()]
        lines.append(way.ljust(36) + "".join(cell.rjust(24) for cell in cells))
    lines.append("largest difference of a log-likelihood from ours, nats")
    for peer in PEERS:
        gaps = [x for name, x in result["largest_difference"].items() if name.startswith(f"{peer}:")]
        lines.append(peer.ljust(36) + "".join(f"{gap:.1e}".rjust(24) for gap in gaps))
    lines.append("all agree" if result["agree"] else "they do NOT agree")
    return "\n".join(lines)
