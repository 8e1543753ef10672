"""Claims that are exact, the page that is made of results, and the verb."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from dsv3.bench.claims import bubbles, cache, needles, post, registry, retiling, text
from dsv3.bench.claims.claim import CONTRARY, HOLDS, OPEN, Options
from dsv3.bench.end_to_end.figures import WATCHED
from dsv3.cli import bench as verbs
from dsv3.common.errors import UserError
from dsv3.evaluate.tasks import get
from dsv3.ops.formats import E4M3, E5M6


def options(out: Path) -> Options:
    return Options(True, (0,), 1, out)


def test_counts_and_cost_through_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(verbs.app, ["claims", "counts", "14", "--fast", "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["counts"]["figure"] == "671.0B / 36.6B / 11.6B / 684.5B"
    assert found["cost"]["figure"].startswith("2.7") and found["cost"]["verdict"] == HOLDS
    assert found["counts"]["command"] == "dsv3 bench claims counts --fast"
    assert (tmp_path / "runs/claims/cost/plot.png").read_bytes()[:4] == b"\x89PNG"

    assert CliRunner().invoke(verbs.app, ["claims", "--table"]).exit_code == 0
    made = (tmp_path / "docs/claims.md").read_text(encoding="utf-8")
    assert (
        "| [1](#1-counts) |" in made
        and "671.0B / 36.6B" in made
        and "![cost](images/claims/cost.png)" in made
    )
    assert made.count("| not run |") == len(registry.CLAIMS) - 2
    assert (tmp_path / "docs/images/claims/counts.png").is_file()


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CLAIMS", {"counts": registry.CLAIMS["counts"], "needles": needles.NEEDLES})
    monkeypatch.setattr(needles, "FOLDER", tmp_path / "nothing")
    first = CliRunner().invoke(verbs.app, ["claims", "--out", str(tmp_path)])
    assert first.exit_code == 0 and "1 counts: 671.0B" in first.stdout
    assert "12 needles waits: claim needles reads" in first.stderr
    second = CliRunner().invoke(verbs.app, ["claims", "--out", str(tmp_path)])
    assert second.exit_code == 0 and "counts" not in second.stdout
    named = CliRunner().invoke(verbs.app, ["claims", "needles", "--out", str(tmp_path)])
    assert isinstance(named.exception, UserError)


def test_unknown_claims_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean balance"):
        registry.named("balanse")
    assert registry.named("3") is registry.CLAIMS["balance"]
    numbers = [claim.number for claim in registry.CLAIMS.values()]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("kind", [E4M3, E5M6])
def test_retiling(kind: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retiling, "TOKENS", 256)
    monkeypatch.setattr(retiling, "CHANNELS", 256)
    found = retiling.measure(options(tmp_path))
    assert found.verdict == HOLDS
    monkeypatch.setattr(retiling, "COLUMN", retiling.ROW)  # the same tiles again add nothing either way
    assert retiling.measure(options(tmp_path)).verdict == CONTRARY


def test_bubbles_by_formula_and_simulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {"step_ms": 11.0, "simulated_ms": 10.0, "bubble_share": 0.3, "simulated_bubble_share": 0.25}
    monkeypatch.setattr(bubbles.pipeline, "bench", lambda names, *_: {"ours": {name: row for name in names}})
    found = bubbles.measure(options(tmp_path))
    assert found.verdict == HOLDS and "1f1b 1.10 times its simulation" in found.figure
    assert found.data["bubbles"]["1f1b"]["16"] == {"formula": 45.0, "simulated": 45.0}  # 15 (F + B)
    bubbles.draw(found.data, tmp_path / "plot.png")
    monkeypatch.setattr(bubbles, "TIMES", bubbles.Times(1.0, 3.0, 1.0))  # I > F: DualPipe's formula is off
    assert bubbles.measure(options(tmp_path)).verdict == CONTRARY


def test_the_cache_holds_latents_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "NARROW", {**cache.NARROW, "num_hidden_layers": 3})
    before = torch.get_rng_state()
    assert cache.latent_bytes("bfloat16") == 3 * (512 + 64) * 2
    assert cache.latent_bytes("fp8") == 3 * 656
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_peers_cache_keys_and_values_of_every_head() -> None:
    assert cache.key_value_bytes(8) == 61 * 2 * 8 * 128 * 2
    assert cache.key_value_bytes(1) == 61 * 2 * 128 * 2


def test_needles_are_read_from_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needles, "FOLDER", tmp_path)

    def write(name: str, right: dict[int, bool]) -> None:
        cells = [
            {"length": length, "depth": depth, "sample": 0, "right": found}
            for length, found in right.items()
            for depth in (0.0, 1.0)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"cells": cells}))

    write("a-before", {256: True, 512: False})
    with pytest.raises(UserError, match="fewer than two"):
        needles.measure(options(tmp_path))
    write("b-after", {256: True, 512: True})
    found = needles.measure(options(tmp_path))
    assert found.verdict == HOLDS and "at the longest 0% and 100%" in found.figure
    write("b-after", {256: False, 512: False})
    assert needles.measure(options(tmp_path)).verdict == CONTRARY
    write("b-after", {256: False, 512: True})
    assert needles.measure(options(tmp_path)).verdict == OPEN


def test_exercises_stand_on_one_page_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TASKS", ("sums", "gcd"))
    monkeypatch.setattr(text, "LEVELS", (2,))
    text.write_exercises(tmp_path / "maths", 30)
    pages = sorted(path.name for path in (tmp_path / "maths").iterdir())
    assert pages == ["gcd-2-0000.txt", "gcd-2-0020.txt", "sums-2-0000.txt", "sums-2-0020.txt"]
    whole = "".join(path.read_text() for path in (tmp_path / "maths").iterdir())
    example = get("gcd", 2, 0).sample(0, "train")
    assert whole.count(example.prompt) == 1 and "think" not in whole
    assert whole.count("\\boxed") == 60


def test_gains_are_read_from_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "FOLDER", tmp_path)
    with pytest.raises(UserError):
        post.measure(options(tmp_path))
    accuracy = {
        "a": {
            "pretrain": [0, 0],
            "sft": [0.0, 0.1],
            "control": [0.1, 0.1],
            "again": [0.3, 0.3],
            "grpo": [0.2, 0.9],
        },
        "b": {
            "pretrain": [0, 0],
            "sft": [0.0, 0.2],
            "control": [0.2, 0.2],
            "again": [0.4, 0.42],
            "grpo": [0.9, 0.4],
        },
    }
    watched = {name: [[4.0] * 5 + [6.0] * 5] * 2 for name in WATCHED}
    made = {"accuracy": accuracy, "watched": watched, "questions": {"a": 9, "b": 9}, "seeds": [0, 1]}
    monkeypatch.setattr(post, "recipes", SimpleNamespace(load=lambda *_: None))
    monkeypatch.setattr(post, "gather", lambda recipe: made)
    found = post.measure(options(tmp_path))
    assert found.verdict == f"distillation: {HOLDS}; GRPO: {OPEN}"
    assert "distillation +20.5 ± 6.4 points" in found.figure and "of 4.0 tokens" in found.figure
    post.draw(found.data, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
