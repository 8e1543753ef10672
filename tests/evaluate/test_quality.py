"""Bits per byte beside other number formats: which text is read, and that each format's model answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from dsv3.checkpoint.convert import convert
from dsv3.common.errors import UserError
from dsv3.data.loader import Batch
from dsv3.data.tokenizer import Tokenizer, train
from dsv3.evaluate.held_out import evaluate, total_loss
from dsv3.evaluate.quality import AS_STORED, compare, read
from dsv3.quant.packed import Integers, pack
from tests.model.build import tiny_model

TEXT = "some words to learn from and to say again, and then some more of them; " * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "model"
    tokenizer = train([TEXT], 330)
    dsv3.save(tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1), folder)
    tokenizer.save(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def test_a_text_is_read_in_sequences(folder: Path) -> None:
    tokenizer, text = Tokenizer.load(folder), folder.parent / "text.txt"
    ids = torch.tensor(tokenizer.encode(TEXT))
    rows = read(tokenizer, text, 16, 1000)["text.txt"]
    assert rows.shape == ((len(ids) - 1) // 16, 17)
    for number, row in enumerate(rows):  # each begins with the token the one before it ended with
        assert torch.equal(row, ids[16 * number : 16 * number + 17])
    assert torch.equal(read(tokenizer, text, 16, 2)["text.txt"], rows[:2])


def test_every_format_is_the_model_in_that_format(folder: Path) -> None:
    text = folder.parent / "text.txt"
    found = compare(folder, text, ["int8", "int4", "fp8"], length=16, sequences=4)
    assert list(found) == [AS_STORED, "int8", "int4", "fp8"]
    tokenizer = Tokenizer.load(folder)
    rows = read(tokenizer, text, 16, 4)["text.txt"]
    lengths = torch.from_numpy(tokenizer.byte_lengths).long()
    for name in found:
        model = dsv3.load(folder, quantize=None if name == AS_STORED else name)
        assert found[name]["text.txt"] == evaluate(model, Batch(rows), lengths, 16)
    assert len({row["text.txt"].loss for row in found.values()}) == 4
    convert(folder, folder.parent / "int4", "int4")
    stored = compare(folder.parent / "int4", text, [], length=16, sequences=4)
    assert stored[AS_STORED] == found["int4"]


def test_a_packed_head_says_the_same_as_its_logits() -> None:
    model = tiny_model()
    pack(model, Integers(8))
    ids = torch.randint(61, (30,), generator=torch.Generator().manual_seed(3))
    logits = model(ids[None, :-1]).logits_BTV[0]
    wanted = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    assert total_loss(model, ids.tolist(), length=29) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "nothing.txt"}, r"--data \(.*nothing\.txt\) does not exist; give prepared data"),
        ({"source": "model/model.safetensors"}, "no text in UTF-8"),
        ({"length": 10_000}, r"has \d+ tokens; --length \(10000\) must be less"),
        ({"formats": ["int3"]}, r"quantize \('int3'\) is unknown"),
        ({"source": "other"}, "another tokenizer than the model"),
        ({"source": "texts"}, r"texts\) holds no prepared data .* or give one text file"),
    ],
    ids=str,
)
def test_refusals(folder: Path, changes: dict[str, Any], says: str) -> None:
    (folder.parent / "other").mkdir(exist_ok=True)
    train(["something else entirely"] * 9, 300).save(folder.parent / "other")
    (folder.parent / "other" / "manifest.json").touch()
    (folder.parent / "texts").mkdir(exist_ok=True)
    arguments = {"source": "text.txt", "formats": [], "length": 16, **changes}
    source = folder.parent / arguments.pop("source")
    with pytest.raises(UserError, match=says) as caught:
        compare(folder, source, **arguments)
    assert "\n" not in str(caught.value)
