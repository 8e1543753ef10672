"""MTP modules (report 2.2) against the per-token reference and against transformers' ``MtpModel``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.model import reference
from tests.model.build import ids, tiny_model
from tests.model.test_parity import close
from tests.model.transformers_twin import mtp_twin_of, to_twin, twin_of

SMALL: dict[str, Any] = dict(num_hidden_layers=2, num_attention_heads=2, vocab_size=31)


@pytest.mark.parametrize("future", [0, 1, 2])
@pytest.mark.parametrize("depth", [1, 2])
def test_states_and_gradients_equal_the_per_token_reference(depth: int, future: int) -> None:
    """Every depth's states, their length, and the gradients of every parameter of a loss over all depths."""
    model = tiny_model(num_nextn_predict_layers=depth, **SMALL)
    tokens = ids(1, 5 + future, vocab=31)
    states, router = model.hidden_states(tokens[:, :5], future_ids_BF=tokens[:, 5:] if future else None)
    weights = reference.double_weights(model)
    wanted = reference.all_states(model.config, weights, tokens[0].tolist(), future)
    assert len(states) == len(wanted) == 1 + depth
    assert [s.shape[1] for s in states] == [5 - max(0, k - future) for k in range(depth + 1)]
    assert sorted(router) == [1, *(2 + k for k in range(depth))]

    loss, wanted_loss = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(states, wanted, strict=True):
        theirs_logits = reference.logits(weights, theirs[: ours.shape[1]])
        ours_logits = model.lm_head(ours)[0]
        assert (ours_logits - theirs_logits).abs().max() <= 1e-4
        labels = torch.arange(len(ours_logits)) % 31
        loss = loss + F.cross_entropy(ours_logits, labels, reduction="sum")
        wanted_loss = wanted_loss + F.cross_entropy(theirs_logits, labels, reduction="sum")
    loss.backward()
    wanted_loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, weights[name].grad, 1e-3, f"gradient of {name}")


@pytest.mark.parametrize("depth", [1, 2])
def test_equals_transformers(depth: int) -> None:
    """transformers' own MTP layers, one call a depth on known tokens: logits and gradients."""
    model = tiny_model(num_nextn_predict_layers=depth)
    twin = twin_of(model)
    mtp = mtp_twin_of(model, twin)
    tokens = ids(2, 13)
    output = model(tokens)
    state = twin.model(tokens).last_hidden_state
    ours_total, theirs_total = output.logits_BTV.square().sum(), twin.lm_head(state).square().sum()
    assert len(output.mtp_logits) == depth
    for k in range(1, depth + 1):
        positions = torch.arange(13 - k)[None].expand(2, -1)
        state = mtp.forward_layer(k - 1, state[:, : 13 - k], positions, None, input_ids=tokens[:, k:])
        ours, theirs = output.mtp_logits[k - 1], mtp.shared_head(state)
        assert ours.shape == (2, 13 - k, 61)
        assert (ours - theirs).abs().max() <= 1e-4
        ours_total, theirs_total = ours_total + ours.square().sum(), theirs_total + theirs.square().sum()
    ours_total.backward()
    theirs_total.backward()
    gradients = to_twin({name: parameter.grad for name, parameter in model.named_parameters()})
    block = {name: p.grad for name, p in mtp.layers.named_parameters()}
    main = {name: p.grad for name, p in twin.named_parameters()}
    compared = 0
    for name, gradient in gradients.items():
        index = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        if index < 3:
            theirs_grad = main[name]
        else:
            rest = name.split(".", 3)[3].replace("shared_head.norm", "post_norm")
            direct = f"{index - 3}.{rest}"
            theirs_grad = block[direct] if direct in block else block[f"{index - 3}.mtp_block.{rest}"]
            compared += 1
        close(gradient, theirs_grad, 1e-3, f"gradient of {name}")
    assert compared == len(block)


def test_documents_and_positions_reach_the_modules() -> None:
    """Two packed documents: inside each, every depth equals the document alone."""
    model = tiny_model(num_nextn_predict_layers=2)
    tokens = ids(1, 16)
    documents = torch.tensor([[0] * 9 + [1] * 7])
    positions = torch.tensor([[*range(9), *range(7)]])
    packed, _ = model.hidden_states(tokens, positions_BT=positions, documents_BT=documents)
    for start, stop in ((0, 9), (9, 16)):
        alone, _ = model.hidden_states(tokens[:, start:stop])
        for k in range(3):  # the last k tokens of a document have no label inside it at depth k
            assert torch.allclose(packed[k][:, start : stop - k], alone[k], atol=1e-5)


def test_without_mtp_and_with_too_short_a_sequence() -> None:
    model = tiny_model(num_nextn_predict_layers=2)
    states, router = model.hidden_states(ids(1, 6), mtp=False)
    assert len(states) == 1 and sorted(router) == [1, 2]
    assert model(ids(1, 6), mtp=False).mtp_logits == []
    assert [logits.shape[1] for logits in model(ids(1, 2)).mtp_logits] == [1]  # depth 2 covers nothing
    assert model(ids(1, 1)).mtp_logits == []


def test_modules_hold_neither_embedding_nor_head() -> None:
    names = [name for name, _ in tiny_model(num_nextn_predict_layers=1).named_parameters()]
    own = [name for name in names if name.startswith("model.layers.3.")]
    assert {"model.layers.3.enorm.weight", "model.layers.3.shared_head.norm.weight"} <= set(own)
    assert not any("embed_tokens" in name or "shared_head.head" in name for name in own)
