from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from dsv3.common.errors import UserError
from dsv3.common.files import sha256
from dsv3.config.data import DataRecipe
from dsv3.config.recipe import validate
from dsv3.data import filters, fim
from dsv3.data.prepare import prepare, report, run, train_tokenizer
from dsv3.data.shards import TokenShards, open_split
from dsv3.data.tokenizer import Tokenizer

from .conftest import SAMPLE

WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]


def write_documents(folder: Path, count: int, seed: int = 0, words: int = 60) -> list[str]:
    rng = random.Random(seed)
    texts = [
        f"Document {seed}-{n}.\n\n" + " ".join(rng.choices(WORDS, k=words)) + ".\n\nEnd!\n"
        for n in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    for place in range(0, count, 100):
        (folder / f"{place:05d}.jsonl").write_text("".join(lines[place : place + 100]))
    return texts


@pytest.fixture
def tree(tmp_path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """A recipe of two sources of 300 and 100 documents, with a tokenizer, in ten or so shard groups."""
    write_documents(tmp_path / "a", 300)
    write_documents(tmp_path / "b", 100, seed=1)
    tokenizer.save(tmp_path / "tok")
    return {
        "out": str(tmp_path / "out"),
        "sources": [
            {"name": "a", "paths": [str(tmp_path / "a")], "weight": 3},
            {"name": "b", "paths": [str(tmp_path / "b")]},
        ],
        "tokenizer": {"path": str(tmp_path / "tok")},
        "valid_fraction": 0.1,
        "shard_bytes": 15_000,
        "workers": 1,
    }


def recipe(tree: dict[str, Any], **changes: Any) -> DataRecipe:
    return validate(DataRecipe, {**tree, **changes})


def contents(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): sha256(p) for p in sorted(out.rglob("*")) if p.is_file()}


def documents(shards: TokenShards) -> list[list[int]]:
    whole = shards.tokens(0, len(shards)).tolist()
    bounds = [*shards.document_starts.tolist(), len(shards)]
    return [whole[a:b] for a, b in itertools.pairwise(bounds)]


def texts_of(tokenizer: Tokenizer, shards: TokenShards) -> list[str]:
    """Documents as text, checking the end of sentence and undoing fill-in-the-middle."""
    found = []
    for ids in documents(shards):
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]
        ids = ids[:-1]
        if ids[0] == tokenizer.fim_begin_id:
            found.append("".join(tokenizer.decode(piece) for piece in fim.take_apart(tokenizer, ids)))
        else:
            found.append(tokenizer.decode(ids))
    return found


def test_every_document_arrives_once(tree: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = prepare(recipe(tree))
    manifest = json.loads((out / "manifest.json").read_text())
    for name, count, seed in (("a", 300, 0), ("b", 100, 1)):
        train, valid = TokenShards(out / "train" / name), TokenShards(out / "valid" / name)
        train.verify()
        valid.verify()
        expected = write_documents(tmp_path / "again", count, seed)
        held_out = texts_of(tokenizer, valid)
        assert sorted(texts_of(tokenizer, train) + held_out) == sorted(expected)
        assert 0.03 * count < len(held_out) < 0.2 * count
        shuffled = texts_of(tokenizer, train)
        assert shuffled == sorted(shuffled, key=lambda text: filters.order(filters.identity(text), 0))
        # The held-out text is kept beside its tokens, in the same order.
        lines = (out / "valid" / name / "text.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == held_out
        assert json.loads(lines[0])["origin"].startswith("0")
        for split, shards in (("train", train), ("valid", valid)):
            counts = manifest["sources"][name][split]
            assert counts["tokens"] == len(shards)
            assert counts["documents"] == shards.documents
            assert counts["text_bytes"] == shards.text_bytes
        assert sum(tokenizer.bytes_of(ids) for ids in documents(train)) == train.text_bytes
    assert [(name, weight) for name, _, weight in open_split(out, "train")] == [("a", 3), ("b", 1)]
    assert not list(out.rglob("work")) + list(out.rglob("*.tmp*"))
    assert len(TokenShards(out / "train" / "a").shards) > 1


def test_fim_and_boundary_split_in_training_only(tree: dict[str, Any], tokenizer: Tokenizer) -> None:
    out = prepare(recipe(tree, fim_rate=0.5, boundary_split_prob=0.5))
    train, valid = documents(TokenShards(out / "train/a")), documents(TokenShards(out / "valid/a"))
    share = np.mean([ids[0] == tokenizer.fim_begin_id for ids in train])
    assert 0.4 < share < 0.6
    mark = tokenizer.encode(".\n\n")
    assert mark[0] in tokenizer.joined
    split, whole = [tokenizer.joined[mark[0]][0][0], *tokenizer.joined[mark[0]][1]], mark[0]
    plain = [ids for ids in train if ids[0] != tokenizer.fim_begin_id]
    pairs = sum(ids[at : at + 2] == split for ids in plain for at in range(len(ids)))
    joined = sum(ids.count(whole) for ids in plain)
    assert 0.35 < pairs / (pairs + joined) < 0.65
    for ids in valid:
        assert ids == [*tokenizer.encode(tokenizer.decode(ids[:-1])), tokenizer.eos_id]


def test_the_result_does_not_depend_on_workers(tree: dict[str, Any], tmp_path: Path) -> None:
    one = prepare(recipe(tree))
    two = prepare(recipe(tree, out=str(tmp_path / "two"), workers=2))
    assert contents(one) == contents(two)
    other = prepare(recipe(tree, out=str(tmp_path / "other"), seed=1))
    assert contents(other) != contents(one)
    # Another seed shuffles anew but holds out the same documents.
    text = [sorted((out / "valid/a/text.jsonl").read_text().splitlines()) for out in (one, other)]
    assert text[0] == text[1]


@pytest.mark.parametrize("stage", ["part-*.json", "bucket-*.json"])
def test_killed_and_continued(tmp_path: Path, tokenizer: Tokenizer, stage: str) -> None:
    """SIGKILL while parts, then buckets, are being written; the same command ends with identical files."""
    for name, seed in (("a", 0), ("b", 1)):
        write_documents(tmp_path / name, 1000, seed, words=400)
    tokenizer.save(tmp_path / "tok")
    tree: dict[str, Any] = {
        "out": str(tmp_path / "out"),
        "sources": [{"name": name, "paths": [str(tmp_path / name)]} for name in "ab"],
        "tokenizer": {"path": str(tmp_path / "tok")},
        "shard_bytes": 60_000,
        "workers": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    work = tmp_path / "out" / "work"
    command = [sys.executable, "-m", "dsv3", "data", "prepare", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(work.glob(stage)):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert psutil.wait_procs(children, timeout=20)[1] == [], "workers die with their parent"

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").rglob("*.bin")}
    finished = [json.loads(path.read_text()) for path in work.glob("bucket-*.json")]
    (tmp_path / "out" / "train").mkdir(exist_ok=True)
    (tmp_path / "out" / "train" / ".tmp-1-half").write_text("half written")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MB/s" in done.stdout
    assert "next: dsv3 pretrain" in done.stdout
    for record in finished:  # finished shards are kept, not written again
        for file in record["files"]:
            path = tmp_path / "out" / file
            assert file.endswith("jsonl") or path not in kept or path.stat().st_mtime_ns == kept[path]
    clean = prepare(validate(DataRecipe, {**tree, "out": str(tmp_path / "clean"), "workers": 1}))
    assert contents(tmp_path / "out") == contents(clean)


def test_ctrl_c_ends_at_once_and_quietly(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_documents(tmp_path / "a", 6000, words=400)
    tokenizer.save(tmp_path / "tok")
    command = [sys.executable, "-m", "dsv3", "data", "prepare", str(tmp_path / "recipe.yaml")]
    tree = {
        "out": str(tmp_path / "out"),
        "sources": [{"name": "a", "paths": [str(tmp_path / "a")]}],
        "tokenizer": {"path": str(tmp_path / "tok")},
        "shard_bytes": 100_000,
        "workers": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((tmp_path / "out" / "work").glob("bucket-*")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said


def test_a_damaged_finished_shard_is_made_again(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = prepare(recipe(tree, out=str(tmp_path / "clean")))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dsv3.data.prepare._finish", stop)
        prepare(recipe(tree))
    out = Path(tree["out"])
    victim = sorted((out / "train" / "a").glob("*.bin"))[2]
    raw = bytearray(victim.read_bytes())
    raw[5] ^= 1
    victim.write_bytes(bytes(raw))
    result = run(recipe(tree))
    assert 0 < result.text_bytes < 30_000, "one shard group only"
    assert contents(out) == contents(clean)


def test_run_again_does_nothing_and_takes_new_weights(tree: dict[str, Any]) -> None:
    first = run(recipe(tree))
    assert "MB/s" in report(first)
    before = contents(first.out)
    again = run(recipe(tree, workers=3))
    assert again.text_bytes == 0
    assert "already prepared" in report(again)
    assert contents(first.out) == before
    tree["sources"][0]["weight"] = 9
    assert run(recipe(tree)).manifest["sources"]["a"]["weight"] == 9
    assert open_split(first.out, "train")[0][2] == 9
    victim = next((first.out / "train" / "b").glob("*.bin"))
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(UserError, match=rf"{victim.name} is \d+ bytes long"):
        run(recipe(tree))


def test_duplicates_and_contaminated_documents_go(tree: dict[str, Any], tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in (tmp_path / "a" / "00000.jsonl").read_text().splitlines()]
    copies = [texts[0].replace(" ", "  "), texts[1], texts[1]]
    (tmp_path / "b" / "copies.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in copies))
    (tmp_path / "eval.txt").write_text(" ".join(texts[5].split()[4:17]))
    result = run(recipe(tree, decontaminate=[str(tmp_path / "eval.txt")], valid_fraction=0.0))
    a, b = result.manifest["sources"]["a"], result.manifest["sources"]["b"]
    assert a["dropped"] | {"contaminated": 1, "duplicate": 0} == a["dropped"]
    assert a["train"]["documents"] == 299
    assert b["dropped"]["duplicate"] == 3, "the first source keeps the document"
    assert b["train"]["documents"] == 100
    assert "1 contaminated" in report(result)
    assert "3 duplicate" in report(result)
    assert "a: nothing is held out" in report(result)


def test_trains_its_tokenizer(tree: dict[str, Any], tmp_path: Path) -> None:
    for place, text in enumerate(SAMPLE):
        (tmp_path / "a" / f"{place}.txt").write_text(text)
    del tree["tokenizer"]
    small = recipe(tree, tokenizer={"vocab_size": 600})
    out = prepare(small)
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 600
    assert json.loads((out / "manifest.json").read_text())["tokenizer"]["vocab_size"] == 600
    assert train_tokenizer(small).inner.to_str() == tokenizer.inner.to_str()
    sampled = recipe(
        tree, tokenizer={"vocab_size": 600, "train_bytes": 20_000}, out=str(tmp_path / "sampled")
    )
    assert train_tokenizer(sampled).inner.to_str() != tokenizer.inner.to_str()


def other_recipe(tree: dict[str, Any], tmp_path: Path) -> None:
    prepare(recipe(tree))
    tree["fim_rate"] = 0.2


def other_text(tree: dict[str, Any], tmp_path: Path) -> None:
    prepare(recipe(tree))
    (tmp_path / "a" / "more.txt").write_text("more")


def foreign_folder(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("do not lose me")


def a_file(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")


def missing_path(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["sources"][1]["paths"] = [str(tmp_path / "nowhere")]


def missing_tokenizer(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["tokenizer"] = {"path": str(tmp_path / "nowhere")}


def missing_evaluation(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["decontaminate"] = [str(tmp_path / "nowhere.jsonl")]


def plain_tokenizer(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tok" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if "fim" not in token["content"]]
    path.write_text(json.dumps(content))


def not_writable(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["out"] = "/dev/null/out"


def all_duplicates(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["sources"][1]["paths"] = [str(tmp_path / "a")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            other_recipe,
            r"prepared with another recipe \(it had fim_rate 0\.1, now 0\.2\): choose another out",
        ),
        (other_text, r"prepared from other text \(4 files, \d+ bytes; now 5 files"),
        (foreign_folder, "is not empty and was not written by dsv3 data prepare"),
        (a_file, "is not a folder"),
        (missing_path, "source b: .*nowhere does not exist"),
        (missing_tokenizer, "tokenizer .*nowhere does not exist"),
        (plain_tokenizer, "no special token fim_begin .* or set fim_rate to 0"),
        (not_writable, r"out \(/dev/null/out\) cannot be written: .* choose another"),
        (missing_evaluation, "decontaminate: .*nowhere.jsonl does not exist"),
        (all_duplicates, r"source b has no training document left .*'duplicate': 300"),
    ],
)
def test_refusals(
    tree: dict[str, Any], tmp_path: Path, spoil: Callable[[dict[str, Any], Path], None], message: str
) -> None:
    spoil(tree, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        prepare(recipe(tree))
    assert "\n" not in str(caught.value)
    if spoil is not all_duplicates:
        assert contents(tmp_path) == before, "refused before anything is written"


def test_text_mended_before_anything_was_made_goes_on(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["tokenizer"] = {"vocab_size": 300}
    bad = tmp_path / "a" / "rows.jsonl"
    bad.write_text('{"text": "good"}\nnot JSON\n')
    with pytest.raises(UserError, match=r"rows\.jsonl: line 2 is not JSON"):
        prepare(recipe(tree))
    bad.write_text('{"text": "good"}\n')
    assert (prepare(recipe(tree)) / "manifest.json").is_file()


def test_too_little_disk(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs about \d+KB, the disk has 1KB free"):
        prepare(recipe(tree))


def test_two_at_once(tree: dict[str, Any]) -> None:
    from dsv3.data.folder import lock

    with lock(Path(tree["out"])), pytest.raises(UserError, match="being written by another"):
        prepare(recipe(tree))
