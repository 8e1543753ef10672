"""The plain generator: greedy is the argmax of a whole forward, sampling follows its seed."""

from __future__ import annotations

import pytest
import torch

from dsv3.config.model import ModelConfig
from dsv3.data.tokenizer import train
from dsv3.evaluate.sample import complete, generate
from dsv3.model import DeepSeekV3
from tests.train.conftest import MODEL


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return DeepSeekV3(ModelConfig(**{**MODEL, "initializer_range": 0.5})).eval()


def test_greedy_is_the_argmax_of_each_prefix(model: DeepSeekV3) -> None:
    made = generate(model, [5, 6, 7], 6)
    ids = [5, 6, 7]
    for token in made:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits_BTV[0, -1].argmax())
        ids.append(token)
    assert len(made) == 6


def test_sampling_repeats_with_its_seed_and_differs_with_another(model: DeepSeekV3) -> None:
    one, two, other = (generate(model, [5], 12, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert one == two != other


def test_it_stops_and_stays_in_the_vocabulary(model: DeepSeekV3) -> None:
    greedy = generate(model, [5, 6, 7], 6)
    assert generate(model, [5, 6, 7], 6, stop={greedy[2]}) == greedy[: greedy.index(greedy[2]) + 1]
    assert max(generate(model, [5], 30, temperature=5.0, vocab_size=20)) < 20


def test_fill_in_the_middle_puts_prefix_and_suffix_in_psm_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train(["a few words to learn from, and a few more words"] * 5, 320)
    seen: list[list[int]] = []
    monkeypatch.setattr(
        "dsv3.evaluate.sample.generate",
        lambda model, ids, *a, **k: seen.append(ids) or tokenizer.encode("few"),
    )
    assert complete(None, tokenizer, "a ", " more") == "few"  # type: ignore[arg-type]
    assert complete(None, tokenizer, "a few") == "few"  # type: ignore[arg-type]
    wanted = [
        tokenizer.fim_begin_id, *tokenizer.encode("a "), tokenizer.fim_hole_id,
        *tokenizer.encode(" more"), tokenizer.fim_end_id,
    ]  # fmt: skip
    assert seen == [wanted, tokenizer.encode("a few")]
