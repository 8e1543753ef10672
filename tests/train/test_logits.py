"""The divergence from a teacher against float64: values, gradients, bounds; and in a training step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.cross_entropy import CHUNK_ELEMENTS
from dsv3.train.logits import linear_topk_kl, topk_kl

WORDS, WIDTH = 23, 6


def drawn(seed: int, rows: int = 5, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(rows, WORDS, generator=generator) for _ in range(2))  # type: ignore


def reference(student: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    """In float64, a token and an outcome at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for q_row, p_row in zip(student.double().softmax(1), teacher.double().softmax(1)):
        top = p_row.argsort(descending=True)[:k].tolist()
        rest = [token for token in range(WORDS) if token not in top]
        outcomes = [[token] for token in top] + ([rest] if rest else [])
        for outcome in outcomes:
            p, q = p_row[outcome].sum(), q_row[outcome].sum()
            total = total + p * (p / q).log()
    return total


@pytest.mark.parametrize("k", [1, 4, WORDS - 1, WORDS, 999])
def test_value_and_gradient_equal_float64(k: int) -> None:
    student, teacher = drawn(0)
    student.requires_grad_(True)
    wide = student.detach().double().requires_grad_(True)
    found, wanted = topk_kl(student, teacher, k), reference(wide, teacher, k)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


def test_all_tokens_are_torchs_own_divergence() -> None:
    student, teacher = drawn(1)
    wide = student.double().requires_grad_(True)
    wanted = torch.nn.functional.kl_div(
        wide.log_softmax(1), teacher.double().log_softmax(1), reduction="sum", log_target=True
    )
    student.requires_grad_(True)
    topk_kl(student, teacher, WORDS).backward()
    wanted.backward()
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.grad, student.softmax(1) - teacher.softmax(1), rtol=1e-4, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, WORDS - 1), st.floats(0.1, 20))
def test_never_above_the_whole_and_growing_with_k(seed: int, k: int, scale: float) -> None:
    student, teacher = drawn(seed, scale=scale)
    some, more, whole = (float(topk_kl(student, teacher, n)) for n in (k, k + 1, WORDS))
    slack = 1e-5 * (1 + whole)
    assert -slack <= some <= more + slack <= whole + 2 * slack
    assert abs(float(topk_kl(teacher + 3.0, teacher, k))) < 1e-4  # the same probabilities


def test_a_certain_teacher_leaves_no_numbers_behind() -> None:
    student = torch.zeros(2, WORDS, requires_grad=True)
    teacher = torch.full((2, WORDS), -1e4)
    teacher[:, 3] = 1e4
    found = topk_kl(student, teacher, 2)
    found.backward()
    assert float(found.detach()) == pytest.approx(2 * torch.tensor(float(WORDS)).log().item(), rel=1e-5)
    assert student.grad is not None and student.grad.isfinite().all()


def test_two_heads_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHUNK_ELEMENTS >= WORDS
    monkeypatch.setattr("dsv3.train.logits.CHUNK_ELEMENTS", 2 * WORDS)  # two tokens a chunk
    generator = torch.Generator().manual_seed(2)
    h, w, t, v = (
        torch.randn(*shape, generator=generator).requires_grad_(True)
        for shape in ((5, WIDTH), (WORDS, WIDTH), (5, WIDTH + 1), (WORDS, WIDTH + 1))
    )
    linear_topk_kl(h, w, t, v.detach(), 7).backward()
    grads = h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    topk_kl(h @ w.T, (t @ v.T).detach(), 7).backward()
    torch.testing.assert_close(grads, (h.grad, w.grad))
    assert t.grad is None and v.grad is None
