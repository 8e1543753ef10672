"""The scalar head against transformers' sequence classification: values and every gradient."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DeepseekV3ForSequenceClassification

from dsv3.checkpoint.hf import load, save
from dsv3.model.score import add_score, scores
from tests.model.build import ids, tiny_config, tiny_model
from tests.model.transformers_twin import to_twin, twin_config


def twin_of(model):
    config = twin_config(model.config)
    config.num_labels, config.pad_token_id = 1, 60
    twin = DeepseekV3ForSequenceClassification(config)
    missing, unexpected = twin.load_state_dict(to_twin(dict(model.state_dict())), strict=False)
    assert unexpected == ["lm_head.weight"] and not [m for m in missing if "expert_bias" not in m]
    return twin.eval()


def test_scores_and_gradients_equal_transformers() -> None:
    model = add_score(tiny_model())
    twin = twin_of(model)
    tokens, last = ids(4, 12, vocab=60), torch.tensor([11, 3, 7, 5])
    for row, at in enumerate(last):
        tokens[row, at + 1 :] = 60  # padding
    ours, _ = scores(model, tokens, last)
    theirs = twin(tokens, attention_mask=(tokens != 60).long()).logits[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for values in (ours, theirs):
        (-torch.nn.functional.logsigmoid(values[:2] - values[2:])).sum().backward()
    got = to_twin({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    wanted = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted) and "score.weight" in got
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_what_follows_the_last_token_has_no_part() -> None:
    model = add_score(tiny_model(num_nextn_predict_layers=1))
    tokens, last = ids(2, 9), torch.tensor([4, 8])
    other = tokens.clone()
    other[0, 5:] = 3
    torch.testing.assert_close(scores(model, tokens, last)[0], scores(model, other, last)[0])
    other[0, 4] += 1
    assert not torch.allclose(scores(model, tokens, last)[0][0], scores(model, other, last)[0][0])


def test_a_folder_opens_again_and_in_transformers(tmp_path: Path) -> None:
    model = add_score(tiny_model(num_nextn_predict_layers=1))
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert set(again.state_dict()) == set(model.state_dict())
    assert torch.equal(again.score.weight, model.score.weight)
    tokens, last = ids(3, 8), torch.tensor([7, 7, 7])
    torch.testing.assert_close(scores(again, tokens, last)[0], scores(model, tokens, last)[0])
    twin = DeepseekV3ForSequenceClassification.from_pretrained(tmp_path / "m", attn_implementation="eager")
    assert twin.config.num_labels == 1 and twin.config.architectures == [type(twin).__name__]
    theirs = [twin(tokens[row : row + 1]).logits[0, 0] for row in range(3)]
    torch.testing.assert_close(scores(model, tokens, last)[0], torch.stack(theirs), rtol=1e-4, atol=1e-5)
    quantised = load(tmp_path / "m", quantize="int8")
    torch.testing.assert_close(
        scores(quantised, tokens, last)[0], scores(model, tokens, last)[0], rtol=0.1, atol=0.1
    )


def test_the_head_is_drawn_by_its_seed() -> None:
    model = add_score(tiny_model(), seed=3)
    assert torch.equal(model.score.weight, add_score(tiny_model(), seed=3).score.weight)
    assert not torch.equal(model.score.weight, add_score(tiny_model(), seed=4).score.weight)
    width = tiny_config().hidden_size
    assert 0.5 < model.score.weight.std() * (width + 1) ** 0.5 < 1.5
