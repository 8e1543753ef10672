"""Bits per byte, acceptance and the baselines against values worked out by hand or from full logits."""

from __future__ import annotations

import lzma
import math

import pytest
import torch
import torch.nn.functional as F

from dsv3.config.model import ModelConfig
from dsv3.data.loader import Batch
from dsv3.evaluate.held_out import evaluate, total_loss, unigram_bits_per_byte, xz_bits_per_byte
from dsv3.model import DeepSeekV3
from tests.train.conftest import MODEL

ROWS = torch.randint(0, 384, (5, 19), generator=torch.Generator().manual_seed(2))
LENGTHS = torch.arange(384) % 4


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return DeepSeekV3(
        ModelConfig(**{**MODEL, "num_nextn_predict_layers": 2, "initializer_range": 0.3})
    ).eval()


@pytest.fixture(scope="module")
def few_words() -> DeepSeekV3:
    """Three tokens are ever chosen, so that drafts agree now and then."""
    config = ModelConfig(**{**MODEL, "num_nextn_predict_layers": 2, "initializer_range": 0.3})
    model = DeepSeekV3(config).eval()
    with torch.no_grad():
        model.lm_head.weight[3:] = 0.0
        model.lm_head.weight[:3] *= 50
    return model


def test_loss_and_bits_per_byte_are_those_of_the_logits(model: DeepSeekV3) -> None:
    found = evaluate(model, Batch(ROWS), LENGTHS, length=16, batch=2)
    with torch.no_grad():
        logits = model(ROWS[:, :16]).logits_BTV
    nats = F.cross_entropy(logits.flatten(0, 1), ROWS[:, 1:17].flatten(), reduction="sum")
    assert found.loss == pytest.approx(float(nats) / 80, rel=1e-5)
    size = int(LENGTHS[ROWS[:, 1:17]].sum())
    assert found.bits_per_byte == pytest.approx(float(nats) / math.log(2) / size, rel=1e-5)


def test_acceptance_compares_the_draft_with_the_models_own_choice(few_words: DeepSeekV3) -> None:
    model = few_words
    with torch.no_grad():
        output = model(ROWS[:, :16])
    found = evaluate(model, Batch(ROWS), LENGTHS, length=16)
    own = output.logits_BTV.argmax(-1)
    for depth, logits in enumerate(output.mtp_logits, start=1):
        draft = logits.argmax(-1)  # at i: the token at i + depth + 1, the main model's choice at i + depth
        pairs = [(row, i) for row in range(5) for i in range(16 - depth)]
        share = sum(bool(draft[row, i] == own[row, i + depth]) for row, i in pairs) / len(pairs)
        astray = sum(bool(draft[row, i] == own[row, i]) for row, i in pairs) / len(pairs)
        assert found.acceptance[depth - 1] == pytest.approx(share) != pytest.approx(astray)
        assert 0 < share < 1


def test_documents_and_marks_count_as_each_document_alone(few_words: DeepSeekV3) -> None:
    model = few_words
    lengths = (5, 8, 3)  # packed into 16 positions, and the columns of next token and two MTP depths
    documents = torch.tensor([[0] * 5 + [1] * 8 + [2] * 3 + [3] * 3] * 2)
    bears = torch.rand(2, 19, generator=torch.Generator().manual_seed(1)) < 0.7
    rows = Batch(ROWS[:2], documents, bears)
    packed = evaluate(model, rows, LENGTHS, length=16, batch=1)
    nats = tokens = size = 0.0
    agreed, drafted = [0, 0], [0, 0]
    for row in range(2):
        for at, count in zip((0, 5, 13), lengths):
            ids, marks = ROWS[row, at : at + count], bears[row, at : at + count]
            with torch.no_grad():
                output = model(ids[None])
            own = output.logits_BTV[0].argmax(-1)
            for i in range(count - 1):
                if marks[i + 1]:
                    nats += float(F.cross_entropy(output.logits_BTV[0, i], ids[i + 1]))
                    tokens, size = tokens + 1, size + int(LENGTHS[ids[i + 1]])
            for depth, logits in enumerate(output.mtp_logits, start=1):
                for i in range(count - 1 - depth):
                    if marks[i + 1 + depth]:
                        agreed[depth - 1] += bool(logits[0, i].argmax() == own[i + depth])
                        drafted[depth - 1] += 1
    assert packed.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert packed.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert packed.acceptance == [a / d for a, d in zip(agreed, drafted)]
    assert all(0 < a < d for a, d in zip(agreed, drafted))
    assert evaluate(model, Batch(ROWS[:2]), LENGTHS, length=16).loss != pytest.approx(packed.loss, rel=1e-3)


def test_total_loss_reads_every_token_once(model: DeepSeekV3) -> None:
    ids = ROWS[0].tolist()
    with torch.no_grad():
        wanted = sum(
            float(
                F.cross_entropy(
                    model(ROWS[:1, start:stop]).logits_BTV[0], ROWS[0, start + 1 : stop + 1], reduction="sum"
                )
            )
            for start, stop in ((0, 8), (8, 16), (16, 18))
        )
    assert total_loss(model, ids, length=8) == pytest.approx(wanted, rel=1e-5)


def test_baselines() -> None:
    assert unigram_bits_per_byte(b"ab" * 1000, b"abab") == pytest.approx(-math.log2(1001 / 2256))
    assert unigram_bits_per_byte(b"", b"xyz") == pytest.approx(8)
    text = b"the same line again\n" * 50
    assert xz_bits_per_byte(text) == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))
