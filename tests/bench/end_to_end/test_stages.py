"""Every stage once, really, by ``recipes/pipeline-fast.yaml``; what is left, after three kills too."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dsv3.bench.end_to_end.figures import gather
from dsv3.bench.end_to_end.stages import _claim, _repeated, steps
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.end_to_end import EndToEndRecipe

ROOT = Path(__file__).parents[3]
FAST = ROOT / "recipes" / "pipeline-fast.yaml"
TIMES = ("minutes", "cpu_minutes", "wall_minutes", "served", "machine")  # "served" names the folder


def arguments(out: Path) -> list[str]:
    return ["--out", str(out), "--data.changes.out", str(out.with_name("data"))]


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "dsv3", "bench", "end-to-end", str(FAST), *arguments(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def finish(out: Path) -> str:
    process = start(out)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    return said


def figures(out: Path) -> dict:
    found = gather(recipes.load(EndToEndRecipe, FAST, arguments(out)))
    return {name: value for name, value in found.items() if name not in TIMES}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("end-to-end") / "run"
    finish(out)
    return out


@pytest.mark.slow
def test_every_stage_leaves_what_the_page_says(whole: Path) -> None:
    found = figures(whole)
    for stage in ("sft", "control", "again", "grpo"):
        lines = (whole / "seed-0" / stage / "eval" / "letters-1.jsonl").read_text().splitlines()[1:]
        scores = [json.loads(line)["scores"]["accuracy"] for line in lines]
        assert len(scores) == 16
        assert found["accuracy"]["letters:1"][stage] == [sum(scores) / 16]
        assert f"{100 * sum(scores) / 16:.1f}" in (whole / "pipeline.md").read_text()
    assert found["accuracy"]["letters:1"]["pretrain"] == [0]
    written = [(whole / "seed-0" / stage / "recipe.yaml").read_text() for stage in ("sft", "grpo")]
    seeds = [yaml.safe_load(text)["seed"] for text in written]
    assert len(set(seeds)) == 2  # of one seed GRPO's first questions would be those that SFT has answered
    trained = found["trained"]
    assert trained["control"]["step"] == pytest.approx(trained["again"]["step"], abs=2)
    assert found["accuracy"]["letters:1"]["sft"][0] > 0.4  # what is right most often is learnt
    assert found["distilled"][0]["kept"] == found["distilled"][0]["answered"] > 0
    kept = (whole / "seed-0" / "distill" / "samples.jsonl").read_text().splitlines()
    assert len(kept) == found["distilled"][0]["kept"]
    assert len(found["watched"]["reward"][0]) == 3 and max(found["watched"]["reward"][0]) > 0
    sizes = [found["quantized"][kind]["bytes"] for kind in ("grpo", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] < sizes[0] / 3
    served = json.loads((whole / "seed-0" / "answer.json").read_text())
    assert served["answer"] and served["usage"]["completion_tokens"] > 0
    for picture in ("accuracy", "grpo"):
        assert (whole / "images" / f"pipeline_{picture}.png").stat().st_size > 1000


def test_a_folder_is_of_one_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But seeds can be added, and notes."""
    monkeypatch.chdir(ROOT)
    recipe = recipes.load(EndToEndRecipe, FAST, ["--seeds", "[0]"])
    _claim(recipe, tmp_path)
    _claim(recipe.model_copy(update={"seeds": [0, 1], "notes": ["it was so"]}), tmp_path)
    written = recipes.load(EndToEndRecipe, tmp_path / "recipe.yaml")
    assert written.seeds == [0, 1] and written.notes == []
    other = recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"changes": {"epochs": 3}})})
    for one in (other, recipe.model_copy(update={"prompts": 9})):
        with pytest.raises(UserError, match="holds a run of another recipe; choose another --out"):
            _claim(one, tmp_path)
    assert recipes.load(EndToEndRecipe, tmp_path / "recipe.yaml") == written


@pytest.mark.slow
def test_done_is_done_and_another_recipe_is_refused(whole: Path, tmp_path: Path) -> None:
    page = (whole / "pipeline.md").read_text()
    command = [sys.executable, "-m", "dsv3", "bench", "end-to-end", str(FAST), *arguments(whole)]
    docs = tmp_path / "docs"
    more = ["--docs", str(docs), "--notes", "[it was so]"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and "[" not in done.stdout  # no stage was begun
    assert (docs / "pipeline.md").read_text() == page + "\n## What to know\n\n* it was so\n"
    done = subprocess.run([*command, "--prompts", "9"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "holds a run of another recipe" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_three_kills_change_nothing(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "data").symlink_to(whole.with_name("data"))  # its own preparation is killed elsewhere
    seed = out / "seed-0"
    moments: list[Callable[[], bool]] = [
        lambda: (seed / "sft" / "metrics.jsonl").exists(),
        lambda: (seed / "distill" / "attempts.jsonl").exists(),
        lambda: (seed / "grpo" / "checkpoints" / "step-000001").exists(),
    ]
    for moment in moments:
        process = start(out)
        end = time.monotonic() + 600
        while not moment():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "nothing happened for ten minutes"
            time.sleep(0.01)
        process.kill()
        process.communicate()
    finish(out)
    assert figures(out) == figures(whole)


def test_the_control_has_as_many_rows_and_nothing_new(tmp_path: Path) -> None:
    examples, kept, repeated = (tmp_path / name for name in ("examples", "kept", "repeated"))
    examples.write_text("".join(f'{{"row": {number}}}\n' for number in range(10)))
    kept.write_text("{}\n" * 15)
    assert _repeated(repeated, examples, kept)
    rows = [json.loads(line)["row"] for line in repeated.read_text().splitlines()]
    assert sorted(Counter(rows).values()) == [2] * 5 + [3] * 5 and set(rows) == set(range(10))


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for more, message in (
        (["--tasks", "[sumz]"], r"task \(sumz\) is unknown"),
        (["--tasks", "[sums:9]"], r"difficulty \(9\)"),
        (["--pretrain.changes", "{batches: 3}"], "unknown key batches"),
        (["--data.recipe", "none.yaml"], "none.yaml does not exist"),
        (["--quantize", "[int3]"], "int3"),
        (["--seeds", "[]"], "seeds"),
    ):
        with pytest.raises(UserError, match=message):
            list(steps(recipes.load(EndToEndRecipe, FAST, [*arguments(out), *more])))
    assert not out.exists()
