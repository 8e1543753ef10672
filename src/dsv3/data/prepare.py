"""``dsv3 data prepare``: a data recipe into token shards, in parallel, surviving a kill at any moment.

Two passes. The first reads the sources and throws the documents into buckets by their place in the shuffled
order (:mod:`dsv3.data.spill`); the second sorts, de-duplicates, splits and tokenises each bucket
(:mod:`dsv3.data.bucket`). Every unit of work appears on disk whole or not at all and depends on nothing but
the recipe and the text, so the result is the same for any number of workers and interruptions.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsv3.common.errors import UserError
from dsv3.common.files import TEMPORARY, sha256, write_atomic, write_json
from dsv3.common.progress import Progress, duration, human
from dsv3.config.data import DataRecipe
from dsv3.data import bucket, filters, spill
from dsv3.data.fetch import licences
from dsv3.data.folder import check_disk, check_out, lock, state_of
from dsv3.data.shards import TokenShards, write_manifest
from dsv3.data.sources import Part, Skipped, plan, read
from dsv3.data.tokenizer import Tokenizer, train

J = TypeVar("J")


@dataclass(frozen=True)
class Result:
    """What a preparation came to. ``text_bytes``: tokenized by this call in ``seconds``."""

    out: Path
    manifest: dict[str, Any]
    text_bytes: int
    seconds: float


def prepare(recipe: DataRecipe) -> Path:
    """Prepare a recipe's data and return its folder; see :func:`run`."""
    return run(recipe).out


def run(recipe: DataRecipe) -> Result:
    """Write ``out/{train,valid}/<source>/``, ``out/tokenizer.json`` and, last, ``out/manifest.json``.

    A call that was interrupted is continued by the same call. With more than one worker the calling script
    needs the usual ``if __name__ == "__main__":``. Raises :class:`UserError` before any work for a bad
    source, tokenizer or evaluation file, too little disk space, or an ``out`` prepared with another recipe.
    """
    started = time.monotonic()
    out = Path(recipe.out)
    parts = plan(recipe.sources)
    if recipe.tokenizer.path is not None:
        _check_tokenizer(recipe, Tokenizer.load(recipe.tokenizer.path))
    filters.decontaminator(tuple(recipe.decontaminate))
    state = state_of(recipe, parts)
    finished = check_out(out, state)
    if finished is None:
        check_disk(out, parts)
    with lock(out):
        if finished is not None:
            return Result(out, _refresh(recipe, finished), 0, time.monotonic() - started)
        (out / "work").mkdir(parents=True, exist_ok=True)
        write_json(out / "work" / "plan.json", state)
        for stale in out.rglob(f"{TEMPORARY}*"):
            stale.unlink(missing_ok=True)
        _tokenizer(recipe, parts)
        indexes = _spill(recipe, parts)
        records, text_bytes, seconds = _write(recipe, indexes)
        manifest = _finish(recipe, state, indexes, records)
    return Result(out, manifest, text_bytes, seconds)


def _check_tokenizer(recipe: DataRecipe, tokenizer: Tokenizer) -> None:
    for name in ("eos", "fim_begin", "fim_hole", "fim_end") if recipe.fim_rate else ("eos",):
        try:
            tokenizer.special(name)
        except UserError as error:
            raise UserError(
                f"tokenizer.path ({recipe.tokenizer.path}): {error}; take another tokenizer"
                + (" or set fim_rate to 0" if name != "eos" else "")
            ) from None


def training_texts(recipe: DataRecipe, parts: list[Part], progress: Progress | None = None) -> Iterator[str]:
    """Documents to train the tokenizer on: ``train_bytes`` of text, sampled by hash, nothing held out."""
    wanted = recipe.tokenizer.train_bytes
    share = min(1.0, wanted / max(1, sum(part.text_bytes for part in parts)))
    check = filters.decontaminator(tuple(recipe.decontaminate))
    seen: set[bytes] = set()
    taken = 0
    for part in parts:
        for document in read(part, recipe.sources[part.source], Skipped()):
            identity = filters.identity(document.text)
            if (
                identity in seen
                or filters.order(identity, recipe.seed) >= share * 2.0**64
                or filters.held_out(identity, recipe.valid_fraction)
                or (check is not None and check.contaminated(document.text))
            ):
                continue
            seen.add(identity)
            size = len(document.text.encode())
            taken += size
            if progress is not None:
                progress.advance(size)
            yield document.text
            if taken >= wanted:
                return


def train_tokenizer(recipe: DataRecipe) -> Tokenizer:
    """Train the recipe's tokenizer on its training documents: the one :func:`prepare` would train."""
    return _train(recipe, plan(recipe.sources))


def _train(recipe: DataRecipe, parts: list[Part]) -> Tokenizer:
    expected = min(recipe.tokenizer.train_bytes, sum(part.text_bytes for part in parts))
    with Progress("train tokenizer", expected, "B") as progress:
        tokenizer = train(training_texts(recipe, parts, progress), recipe.tokenizer.vocab_size)
        if tokenizer.vocab_size < recipe.tokenizer.vocab_size:
            progress.line(
                f"tokenizer.vocab_size: the text has merges for {tokenizer.vocab_size} tokens only,"
                f" not {recipe.tokenizer.vocab_size}"
            )
    return tokenizer


def _tokenizer(recipe: DataRecipe, parts: list[Part]) -> None:
    out = Path(recipe.out)
    if not (out / "tokenizer.json").is_file():  # written last by save(): if it is there, it is whole
        path = recipe.tokenizer.path
        (Tokenizer.load(path) if path else _train(recipe, parts)).save(out)


def _follow_parent() -> None:
    """In a worker: die with the parent, even one killed by SIGKILL."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _run(work: Callable[[J], dict], jobs: Sequence[J], workers: int) -> Iterator[tuple[J, dict]]:
    """Each job and its result, in the order they finish; in this process if one worker is enough."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, work(job)
        return
    context = multiprocessing.get_context("spawn")  # a forked tokenizer may deadlock
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_follow_parent)
    try:
        # Workers start here and inherit the mask: Ctrl-C is the parent's business, which kills them below.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = {pool.submit(work, job): job for job in jobs}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?): lower workers or shard_bytes; the same command goes on"
            " from here"
        ) from None
    except (
        BaseException
    ):  # a failed job or Ctrl-C: nobody waits for the rest, and nothing half written counts
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _spill(recipe: DataRecipe, parts: list[Part]) -> list[dict]:
    """First pass: the index of every part's spill file."""
    work = Path(recipe.out) / "work"
    buckets = max(1, round(sum(part.text_bytes for part in parts) / recipe.shard_bytes))
    indexes: dict[int, dict] = {}
    for number in range(len(parts)):
        index = spill.done(work, number)
        if index is not None:
            indexes[number] = index
    jobs = [
        spill.SpillJob(
            part, number, recipe.sources[part.source], recipe.seed, buckets,
            tuple(recipe.decontaminate), str(work),
        )
        for number, part in enumerate(parts)
        if number not in indexes
    ]  # fmt: skip
    total = sum(part.text_bytes for part in parts)
    before = sum(parts[number].text_bytes for number in indexes)
    with Progress("read", total, "B", done=before) as progress:
        for job, index in _run(spill.spill, jobs, recipe.workers):
            indexes[job.number] = index
            progress.advance(job.part.text_bytes)
    return [indexes[number] for number in range(len(parts))]


def _write(recipe: DataRecipe, indexes: list[dict]) -> tuple[list[dict], int, float]:
    """Second pass: the records of all buckets in order; bytes of text tokenised in this call, and seconds."""
    blocks: dict[int, list[tuple[int, int, int]]] = {}
    for part, index in enumerate(indexes):
        for number, offset, size in index["blocks"]:
            blocks.setdefault(number, []).append((part, offset, size))
    jobs = [
        bucket.BucketJob(
            number, recipe.out, tuple(blocks[number]), tuple(source.name for source in recipe.sources),
            recipe.seed, recipe.valid_fraction, recipe.fim_rate, recipe.boundary_split_prob,
        )
        for number in sorted(blocks)
    ]  # fmt: skip
    records: dict[int, dict] = {}
    for job in jobs:
        record = bucket.finished(job)
        if record is not None:
            records[job.number] = record
    sizes = {job.number: sum(size for _, _, size in job.blocks) for job in jobs}
    started, text_bytes = time.monotonic(), 0
    done = sum(sizes[number] for number in records)
    if records:
        print(f"going on: {len(records)} of {len(jobs)} shard groups are there and intact", file=sys.stderr)
    with Progress("tokenize", sum(sizes.values()), "B", done=done) as progress:
        for job, record in _run(
            bucket.write_bucket, [j for j in jobs if j.number not in records], recipe.workers
        ):
            records[job.number] = record
            text_bytes += record["read_bytes"]
            progress.advance(sizes[job.number])
    return [records[job.number] for job in jobs], text_bytes, time.monotonic() - started


def _finish(recipe: DataRecipe, state: dict, indexes: list[dict], records: list[dict]) -> dict[str, Any]:
    """Write the manifests and the held-out text, then take the working files away."""
    out = Path(recipe.out)
    sources: dict[str, dict] = {}
    for number, source in enumerate(recipe.sources):
        mine = [index for index in indexes if index["source"] == number]
        dropped = {key: sum(index["dropped"][key] for index in mine) for key in mine[0]["dropped"]}
        dropped["duplicate"] = sum(record["duplicates"][source.name] for record in records)
        entry: dict[str, Any] = {"weight": source.weight, "dropped": dropped}
        if source.manifest is not None:
            entry["licences"] = licences(source.manifest)
        for split in ("train", "valid"):
            folder = out / split / source.name
            shards = bucket.shard_infos(records, split, source.name)
            entry[split] = {"tokens": 0, "documents": 0, "text_bytes": 0}
            if shards:
                entry[split] = write_manifest(folder, shards)
                TokenShards(folder)  # sizes are right
                if split == "valid":
                    texts = [(folder / f"{shard.name}.jsonl").read_bytes() for shard in shards]
                    write_atomic(folder / "text.jsonl", b"".join(texts))
        if not entry["train"]["documents"]:
            raise UserError(
                f"source {source.name} has no training document left (dropped: {dropped}): take it out"
            )
        sources[source.name] = entry
    tokenizer = Tokenizer.load(out)
    manifest = {
        **state,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": sha256(out / "tokenizer.json")},
        "sources": sources,
    }
    write_json(out / "manifest.json", manifest)
    _clean(out)
    return manifest


def _clean(out: Path) -> None:
    shutil.rmtree(out / "work", ignore_errors=True)
    for piece in out.glob("valid/*/shard-*.jsonl"):
        piece.unlink()


def _refresh(recipe: DataRecipe, manifest: dict[str, Any]) -> dict[str, Any]:
    """A finished folder: check its shards' sizes and take over the recipe's weights."""
    out = Path(recipe.out)
    _clean(out)
    for name, entry in manifest["sources"].items():
        for split in ("train", "valid"):
            if entry[split]["documents"]:
                TokenShards(out / split / name)
    weights = {source.name: source.weight for source in recipe.sources}
    if any(entry["weight"] != weights[name] for name, entry in manifest["sources"].items()):
        for name, entry in manifest["sources"].items():
            entry["weight"] = weights[name]
        write_json(out / "manifest.json", manifest)
    return manifest


def report(result: Result) -> str:
    """A table of what was prepared, the speed, and what to do next."""
    lines = ["source            split   documents      tokens        text  bytes/token   dropped"]
    for name, entry in result.manifest["sources"].items():
        for split in ("train", "valid"):
            counts = entry[split]
            ratio = counts["text_bytes"] / counts["tokens"] if counts["tokens"] else 0.0
            dropped = ", ".join(f"{count} {kind}" for kind, count in entry["dropped"].items() if count)
            lines.append(
                f"{name:<17} {split}  {counts['documents']:>10}  {human(counts['tokens']):>10}"
                f"  {human(counts['text_bytes']) + 'B':>10}  {ratio:>11.2f}"
                f"   {(dropped or '-') if split == 'train' else ''}".rstrip()
            )
        if not entry["valid"]["documents"]:
            lines.append(f"{name}: nothing is held out; raise valid_fraction or set max_document_chars")
    if result.text_bytes:
        rate = result.text_bytes / 1e6 / result.seconds
        lines.append(f"tokenized {human(result.text_bytes)}B in {duration(result.seconds)}: {rate:.2f} MB/s")
    else:
        lines.append("already prepared: nothing to do")
    if any(entry["valid"]["documents"] for entry in result.manifest["sources"].values()):
        lines.append(f"next: dsv3 pretrain RECIPE.yaml --data.path {result.out}")
    else:
        lines.append(
            "next: training needs held-out text: prepare again with a larger --valid_fraction, another --out"
        )
    return "\n".join(lines)
