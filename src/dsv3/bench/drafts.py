"""``dsv3 bench decode --mtp``: a trained model with its MTP module's drafts and without, batch 1.

Prompts are cut from held-out text of the model's own domain, since what drafts gain is what is accepted, and
random weights accept nothing. Every round runs both in turns, each in a process of its own; greedily, both
must give the same tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dsv3.bench.decode import answer_of
from dsv3.bench.machine import machine
from dsv3.common.errors import Failure, UserError
from dsv3.common.progress import Progress
from dsv3.config.model import ModelConfig
from dsv3.data.shards import TokenShards, open_split

Prompts = dict[str, list[list[int]]]  # by source


def cut(shards: TokenShards, count: int, length: int) -> list[list[int]]:
    """Prompts of so many tokens, spread evenly over the text."""
    last = len(shards) - length
    if last < count:
        raise UserError(
            f"{shards.folder} has {len(shards)} tokens, too few for {count} prompts of {length};"
            " lower --prompt-tokens or give other --data"
        )
    starts = np.linspace(0, last, count).astype(int).tolist()
    return [[int(token) for token in shards.tokens(start, start + length)] for start in starts]


def held_out(data: Path, model: Path, count: int, length: int) -> Prompts:
    """Prompts of every source of the prepared folder's ``valid`` split, in the model's own tokens."""
    files = [folder / "tokenizer.json" for folder in (data, model)]
    tables = [json.loads(file.read_text(encoding="utf-8"))["model"] for file in files if file.is_file()]
    if len(tables) == 2 and tables[0] != tables[1]:
        raise UserError(f"--data ({data}) has another tokenizer than --mtp ({model}); give the model's own")
    return {name: cut(shards, count, length) for name, shards, _ in open_split(data, "valid")}


def bench(
    model: Path, prompts: Prompts, tokens: int = 128, drafts: int = 1, rounds: int = 3, threads: int = 1
) -> dict[str, Any]:
    """Tokens a second of decoding with ``drafts`` a step and with none, by source; medians and ratios."""
    if not ModelConfig.from_pretrained(model).num_nextn_predict_layers:
        raise UserError(f"--mtp ({model}) has no MTP module; give a model that has one")
    runs: dict[int, list[Mapping[str, Any]]] = {drafts: [], 0: []}
    job = {"model": str(model), "prompts": prompts, "tokens": tokens, "threads": threads}
    with Progress("bench decode --mtp", 2 * rounds, "runs") as progress:
        for _ in range(rounds):
            for number, found in runs.items():
                name = f"{number} drafts"
                progress.note(name)
                found.append(answer_of("dsv3.bench.drafts", {**job, "drafts": number}, name))
                progress.advance(1)
    return {**summary(runs, drafts), "machine": {**machine(), "threads": threads}}


def summary(runs: Mapping[int, list[Mapping[str, Any]]], drafts: int) -> dict[str, Any]:
    """Medians, ratios and acceptance by source; :class:`Failure` if drafts changed a token."""
    ours, peers, ratios = {}, {}, {}
    for source in runs[0][0]:
        with_, without = ([run[source] for run in runs[number]] for number in (drafts, 0))
        if any(run["answers"] != without[0]["answers"] for run in (*with_, *without)):
            raise Failure(f"greedy answers on {source} differ with drafts and without: please report this")
        fast, slow = (median(run["tokens_per_second"] for run in side) for side in (with_, without))
        ours[source] = {
            "decode_tokens_per_second": fast,
            "acceptance": with_[0]["accepted"] / max(1, with_[0]["drafted"]),
            "tokens_per_step": with_[0]["tokens"] / with_[0]["steps"],
            "rounds": [round(run["tokens_per_second"], 2) for run in with_],
        }
        peers[source] = {
            "decode_tokens_per_second": slow,
            "rounds": [round(run["tokens_per_second"], 2) for run in without],
        }
        ratios[f"no-drafts:{source}:batch-1:decode"] = fast / slow
    return {"ratios": ratios, "ours": ours, "peers": {"no-drafts": peers}, "drafts": drafts}


def report(result: dict[str, Any]) -> str:
    """The result as a small table."""
    lines = [f"{'held-out text':<14} drafts: tokens/s, accepted, tokens a step    none: tokens/s   ratio"]
    for source, found in result["ours"].items():
        slow = result["peers"]["no-drafts"][source]["decode_tokens_per_second"]
        ratio = result["ratios"][f"no-drafts:{source}:batch-1:decode"]
        lines.append(
            f"  {source:<12} {found['decode_tokens_per_second']:>16.1f} {found['acceptance']:>9.0%}"
            f" {found['tokens_per_step']:>14.2f} {slow:>19.1f} {ratio:>11.2f}"
        )
    lines.append(
        f"{result['drafts']} drafts a step, greedy, one answer at a time; the same tokens either way"
    )
    return "\n".join(lines)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One side in one round: decoding from the first token of each answer to its last."""
    import dsv3
    from dsv3.serve.params import SamplingParams

    llm = dsv3.LLM(job["model"], draft_tokens=job["drafts"], max_batch=1)
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    found = {}
    for source, prompts in job["prompts"].items():
        llm.generate(prompts[0], params)
        engine.forget()
        seconds, tokens, steps, drafted, accepted = 0.0, 0, 0, 0, 0
        answers = []
        for prompt in prompts:
            sequence = engine.requests[engine.add_request(prompt, params)][0]
            while not sequence.answer:
                engine.step()
            first, before, started = len(sequence.answer), engine.stats.steps, time.perf_counter()
            while not sequence.finished:
                engine.step()
            seconds += time.perf_counter() - started
            tokens += len(sequence.answer) - first
            steps += engine.stats.steps - before
            drafted += sequence.drafted
            accepted += sequence.accepted
            answers.append(sequence.answer)
        found[source] = {
            "tokens_per_second": tokens / seconds, "tokens": tokens, "steps": steps,
            "drafted": drafted, "accepted": accepted, "answers": answers,
        }  # fmt: skip
    return found


def main() -> None:
    """Do the job of standard input."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    try:
        print(json.dumps(measure(job)), flush=True)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
