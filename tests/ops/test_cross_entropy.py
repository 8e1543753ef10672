"""Chunked cross-entropy of a linear head: values, gradients, chunk edges, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3.ops import cross_entropy
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_reference
from tests.ops.compare import agree


def inputs(n: int, d: int, v: int, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(v, (n,))
    labels[torch.rand(n) < ignored] = IGNORE
    return torch.randn(n, d), torch.randn(v, d), labels


@given(st.integers(1, 17), st.integers(1, 6), st.integers(1, 13), st.sampled_from([0.0, 0.3, 1.0]), st.data())
def test_values_and_gradients_at_any_chunk_size(
    n: int, d: int, v: int, ignored: float, data: st.DataObject
) -> None:
    """Chunks of one row, of a few, of exactly all, of more; some, none or all labels ignored."""
    rows = data.draw(st.sampled_from([1, 2, 3, max(1, n - 1), n, n + 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * v)
        h, w, labels = inputs(n, d, v, ignored)
        agree(
            lambda h, w: linear_cross_entropy(h, w, labels),
            lambda h, w: linear_cross_entropy_reference(h, w, labels),
            h,
            w,
        )


@pytest.mark.parametrize("elements", [1, 12, 13, 14, 13 * 5 - 1, 13 * 5, 13 * 5 + 1, 1 << 22])
def test_chunk_boundaries(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around one row, around a whole number of rows, smaller than a row."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    h, w, labels = inputs(11, 4, 13)
    agree(
        lambda h, w: linear_cross_entropy(h, w, labels),
        lambda h, w: linear_cross_entropy_reference(h, w, labels),
        h,
        w,
    )


def test_all_labels_ignored() -> None:
    h, w, _ = inputs(5, 3, 7)
    h.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(h, w, torch.full((5,), IGNORE))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(h.grad, torch.zeros_like(h)) and torch.equal(w.grad, torch.zeros_like(w))


def test_against_float64_log_softmax() -> None:
    h, w, labels = inputs(40, 8, 50)
    logits = h.double() @ w.double().T
    wanted = -sum(
        float(logits[i].log_softmax(0)[label]) for i, label in enumerate(labels.tolist()) if label != IGNORE
    )
    assert float(linear_cross_entropy(h, w, labels)) == pytest.approx(wanted, rel=1e-5)


def test_huge_logits_stay_finite() -> None:
    h, w, labels = inputs(6, 4, 9, ignored=0)
    agree(
        lambda h, w: linear_cross_entropy(1000 * h, w, labels),
        lambda h, w: linear_cross_entropy_reference(1000 * h, w, labels),
        h,
        w,
    )
    assert linear_cross_entropy(1000 * h, w, labels).isfinite()


@pytest.mark.parametrize("trained", ["h", "w", "neither"])
def test_gradient_of_one_input_only(trained: str) -> None:
    h, w, labels = inputs(6, 4, 9)
    h.requires_grad_(trained == "h"), w.requires_grad_(trained == "w")
    loss = linear_cross_entropy(h, w, labels)
    assert loss.requires_grad == (trained != "neither")
    if trained == "neither":
        return
    loss.backward()
    copies = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    linear_cross_entropy_reference(*copies, labels).backward()
    ours, wanted, other = (h, copies[0], w) if trained == "h" else (w, copies[1], h)
    assert torch.allclose(ours.grad, wanted.grad, atol=1e-5) and other.grad is None


def test_bfloat16_states_with_fp32_weights() -> None:
    """Mixed precision: products in BF16, gradients back in each input's own dtype."""
    h, w, labels = inputs(33, 16, 20)
    agree(
        lambda h, w: linear_cross_entropy(h, w, labels),
        lambda h, w: linear_cross_entropy_reference(h, w.bfloat16(), labels),
        h.bfloat16(),
        w,
        tolerance=0.03,
    )


def test_states_need_not_be_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 20)
    h, w, labels = inputs(7, 4, 9)
    agree(
        lambda h, w: linear_cross_entropy(h.T.contiguous().T, w.T.contiguous().T, labels),
        lambda h, w: linear_cross_entropy_reference(h, w, labels),
        h,
        w,
    )
    wide = torch.randn(7, 8)
    wide.requires_grad_()
    linear_cross_entropy(wide[:, ::2], w, labels).backward()
    copy = wide.detach().clone().requires_grad_()
    linear_cross_entropy_reference(copy[:, ::2], w, labels).backward()
    assert torch.allclose(wide.grad, copy.grad, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest new tensor any operator returned (views left out)."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, leaf.numel())
        return out


def test_no_tensor_of_n_times_v_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, v, rows = 64, 8, 128, 4
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * v)
    h, w, labels = inputs(n, d, v)
    h.requires_grad_(), w.requires_grad_()
    with Largest() as seen:
        linear_cross_entropy(h, w, labels).backward()
    assert seen.elements <= max(rows * v, v * d)
    with Largest() as seen:  # the instrument does see the reference's logits
        linear_cross_entropy_reference(h, w, labels).backward()
    assert seen.elements == n * v


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad a trained head's V x D gradient must not be made for nothing."""
    n, d, v, rows = 16, 32, 128, 4
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * v)
    h, w, labels = inputs(n, d, v)
    h.requires_grad_(), w.requires_grad_()
    with torch.no_grad(), Largest() as seen:
        loss = linear_cross_entropy(h, w, labels)
    assert seen.elements <= rows * v < v * d
    assert torch.allclose(loss, linear_cross_entropy(h, w, labels).detach()) and not loss.requires_grad
