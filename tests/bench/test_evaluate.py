"""Four ways to the same scores, on a tiny model; lm-eval's model of ours beside the plain forward."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval (extra [eval]) is not installed")

from dsv3.bench import evaluate
from dsv3.common.errors import UserError
from dsv3.evaluate.benchmarks.base import Benchmark, Question
from dsv3.evaluate.benchmarks.build import build
from tests.evaluate.benchmarks import package
from tests.evaluate.benchmarks.conftest import TEXT, folder

__all__ = ["folder"]


def test_four_ways_agree(folder: Path, tmp_path: Path) -> None:
    piqa = build("piqa", package.write(tmp_path))
    words = [word for word in TEXT.split() if word.isalpha()][:12]
    awkward = [
        Question(str(n), choices=((context, f" {word}"), (context, f" {word}, {word}")), gold=n % 2)
        for n, (word, context) in enumerate(zip(words, ["Question: ", "a\n", "é{{x}} \"'", " x"] * 3))
    ]
    result = evaluate.agree(folder, [piqa, Benchmark("awkward", "acc", awkward)])
    assert result["agree"], evaluate.report(result)
    assert len(result["largest_difference"]) == 6
    accs = {one["acc"] for one in result["scores"][evaluate.OURS].values()}
    assert len(accs) > 1 and "all agree" in evaluate.report(result)


def test_what_does_not_agree_is_said() -> None:
    def way(acc: float, logprob: float) -> dict[str, evaluate.Scores]:
        return {"t": {"acc": acc, "acc_norm": 0.5, "logprobs": [[-1.0, logprob]]}}

    for acc, logprob, wanted in (
        (0.5, -2.0, True),
        (0.6, -2.0, False),
        (0.5, -2.001, False),
        (0.5, float("nan"), False),
    ):
        found = {name: way(0.5, -2.0) for name in (evaluate.OURS, *evaluate.PEERS)}
        found[evaluate.PEERS[2]] = way(acc, logprob)
        result = evaluate._compared(found, ["t"])
        assert result["agree"] is wanted
        assert ("NOT" in evaluate.report(result)) is not wanted


def test_only_choices_after_one_context(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="winogrande is not choices after one context"):
        evaluate.agree(folder, [build("winogrande", package.write(tmp_path))])
