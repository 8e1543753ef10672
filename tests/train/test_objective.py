"""The loss against one computed from full logits; accumulation; documents; recompute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsv3.config.model import ModelConfig
from dsv3.data.loader import Batch
from dsv3.data.targets import labels, restarted_positions
from dsv3.model import DeepSeekV3
from dsv3.model.loss import Share
from dsv3.ops import attention
from dsv3.train import recompute
from dsv3.train.objective import language_loss
from tests.train.conftest import MODEL

TOKENS = torch.randint(0, 384, (4, 35), generator=torch.Generator().manual_seed(5))
DEEP = ModelConfig(**{**MODEL, "num_nextn_predict_layers": 2})


def gradients(model: DeepSeekV3, micro: int = 4) -> dict[str, torch.Tensor]:
    for start in range(0, 4, micro):
        loss, _ = language_loss(model, Batch(TOKENS[start : start + micro]), 32, Share([128] * 3, 4), 0.3)
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_is_that_of_the_full_logits() -> None:
    model = DeepSeekV3(DEEP)
    loss, parts = language_loss(model, Batch(TOKENS), 32, Share([128] * 3, 4), 0.3)
    output = model(TOKENS)
    wanted = [
        F.cross_entropy(logits[:, :32].flatten(0, 1), TOKENS[:, 1 + k : 33 + k].flatten())
        for k, logits in enumerate([output.logits_BTV, *output.mtp_logits])
    ]
    torch.testing.assert_close(parts.main, wanted[0])
    torch.testing.assert_close(torch.stack(parts.mtp), torch.stack(wanted[1:]))
    balance = 1e-3 * parts.balance
    torch.testing.assert_close(loss, wanted[0] + 0.3 / 2 * (wanted[1] + wanted[2]) + balance)
    assert parts.balance > 3.9  # one for each of four expert layers when even, more when not


def test_gradients_do_not_depend_on_the_micro_batch() -> None:
    whole, pieces = gradients(DeepSeekV3(DEEP)), gradients(DeepSeekV3(DEEP), micro=1)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("what", ["report", "layer"])
def test_recomputed_gradients_are_bit_equal(what: str) -> None:
    plain, again = gradients(DeepSeekV3(DEEP)), DeepSeekV3(DEEP)
    recompute.apply(again, what)  # type: ignore[arg-type]
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, plain[name]), name


def kept_bytes(what: str) -> int:
    """Bytes autograd keeps between forward and backward, parameters not counted."""
    model = DeepSeekV3(ModelConfig(**MODEL))
    recompute.apply(model, what)  # type: ignore[arg-type]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = language_loss(model, Batch(TOKENS[:, :34]), 32, Share([128] * 2, 4), 0.3)
    assert loss.requires_grad
    return sum(kept.values())


def test_recompute_keeps_less() -> None:
    none, report, layer = (kept_bytes(what) for what in ("none", "report", "layer"))
    assert layer < report < 0.9 * none


def test_documents_bound_targets_and_positions() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]])
    assert labels(Batch(tokens), 4, 0).tolist() == [[11, 12, 13, 14]]
    assert labels(Batch(tokens, documents), 4, 0).tolist() == [[11, 12, -100, 14]]
    assert labels(Batch(tokens, documents), 4, 1).tolist() == [[12, -100, -100, -100]]
    assert restarted_positions(documents).tolist() == [[0, 1, 2, 0, 1, 0]]


def test_masked_documents_train_as_if_alone() -> None:
    """Two documents in one row, masked, give the loss of the two rows apart."""
    model = DeepSeekV3(ModelConfig(**{**MODEL, "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.0}))
    a, b = TOKENS[0, :17], TOKENS[1, :16]
    row = torch.cat((a, b))[None]
    documents = torch.tensor([[0] * 17 + [1] * 16])
    _, packed = language_loss(model, Batch(row, documents), 32, Share([1], 1), 0.0)
    apart = 0.0
    for document in (a, b):
        logits = model(document[None, :-1]).logits_BTV[0]
        apart += float(F.cross_entropy(logits, document[1:], reduction="sum").detach())
    assert float(packed.main) == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize(("what", "times"), [("none", 1), ("report", 1), ("layer", 2)])
def test_attention_runs_again_only_when_whole_layers_do(
    monkeypatch: pytest.MonkeyPatch, what: str, times: int
) -> None:
    """The report's recompute makes norms and up-projections again, not the attention itself."""
    made, weights = [], attention._Weights
    monkeypatch.setattr(attention, "_Weights", lambda *inputs: made.append(1) or weights(*inputs))
    model = DeepSeekV3(ModelConfig(**MODEL))
    recompute.apply(model, what)  # type: ignore[arg-type]
    loss, _ = language_loss(model, Batch(TOKENS[:, :34]), 32, Share([128] * 2, 4), 0.3)
    assert len(made) == 4  # three layers and the MTP module
    loss.backward()
    assert len(made) == 4 * times + 4  # the backward of attention makes its weights again itself
