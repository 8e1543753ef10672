"""The divergence from a teacher against float64: values, gradients, bounds; and in a training step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.checkpoint.hf import save
from dsv3.common.errors import UserError
from dsv3.config.distill import TeacherSection
from dsv3.data.loader import Batch
from dsv3.data.targets import labels
from dsv3.data.tokenizer import train
from dsv3.model.loss import Share
from dsv3.ops.cross_entropy import CHUNK_ELEMENTS
from dsv3.train.logits import Teacher, linear_topk_kl, topk_kl
from dsv3.train.objective import language_loss
from tests.model.build import ids, tiny_model

WORDS, WIDTH = 23, 6


def drawn(seed: int, rows: int = 5, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, WORDS, generator=generator)
    return student, teacher


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


def batch_of(seed: int) -> Batch:
    bears = torch.rand(2, 12, generator=torch.Generator().manual_seed(seed)) < 0.7
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12], dtype=torch.int32)
    return Batch(ids(2, 12, seed=seed), documents, bears)


def teacher_of(top_k: int, weight: float = 1.0) -> Teacher:
    """Another width than the student's."""
    options = TeacherSection(path="given", top_k=top_k, weight=weight)
    return Teacher(tiny_model(seed=7, hidden_size=48, num_hidden_layers=2), options)


def test_in_the_loss_it_is_float64s_divergence_over_the_tokens_that_bear_loss() -> None:
    model, teacher, batch = tiny_model(num_nextn_predict_layers=1), teacher_of(5, 0.3), batch_of(1)
    length = 10
    labels_BT = labels(batch, length, 0)
    count = int((labels_BT >= 0).sum())
    share = Share([count, 1], 2)
    plain, _ = language_loss(model, batch, length, share, 0.3)
    found, parts = language_loss(model, batch, length, share, 0.3, teacher)
    wanted = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for document in batch.documents_BT[row].unique():  # alone, positions from zero
            inside = (batch.documents_BT[row, :length] == document).nonzero()[:, 0]
            tokens = batch.tokens_BT[row, inside][None]
            bears = labels_BT[row, inside] >= 0
            student, theirs = (who(tokens, mtp=False).logits_BTV[0, bears] for who in (model, teacher.model))
            p, q = theirs.double().softmax(1), student.double().softmax(1)
            top = p.topk(5, dim=1).indices
            p, q = (
                torch.cat((x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)), 1) for x in (p, q)
            )
            wanted = wanted + (p * (p / q).log()).sum()
    assert parts.divergence is not None
    torch.testing.assert_close(parts.divergence.double(), (wanted / count).detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found, plain + 0.3 * parts.divergence, rtol=1e-5, atol=1e-5)
    found.backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_a_student_comes_to_follow_its_teacher() -> None:
    model, teacher = tiny_model(num_nextn_predict_layers=0), teacher_of(8, 10.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    seen = []
    for step in range(40):
        batch = Batch(ids(4, 17, seed=step))
        loss, parts = language_loss(model, batch, 16, Share([64], 4), 0.0, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(parts.divergence))  # type: ignore[arg-type]
    assert sum(seen[-5:]) < 0.7 * sum(seen[:5]), seen


def test_a_teacher_with_other_words_is_refused(tmp_path: Path) -> None:
    tokenizer, other = (train([text * 9], 340) for text in ("some words to learn ", "others are these "))
    for name, who in (("m", tokenizer), ("o", other)):
        who.save(tmp_path / name)
        files = [tmp_path / name / "tokenizer.json"]
        save(tiny_model(vocab_size=400), tmp_path / f"{name}-model", tokenizer_files=files)
    device = torch.device("cpu")
    options = TeacherSection(path=str(tmp_path / "m-model"))
    found = Teacher.load(options, tokenizer, 400, device)
    assert found is not None and not any(p.requires_grad for p in found.model.parameters())
    assert Teacher.load(TeacherSection(), tokenizer, 400, device) is None
    with pytest.raises(UserError, match="has another tokenizer"):
        Teacher.load(options, other, 400, device)
    with pytest.raises(UserError, match=r"has vocab_size 400; set --model\.vocab_size"):
        Teacher.load(options, tokenizer, 384, device)
