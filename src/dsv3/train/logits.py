"""Distillation by logits: the student's distribution is pulled to the teacher's k likeliest tokens.

The vocabulary is seen as k + 1 outcomes: each of the teacher's top k tokens, and any other. The KL divergence
over these is the whole one for k = V, never above it, and zero where the student has the teacher's
probabilities. Renormalising the top k instead would ask the student for more confidence than the teacher has.

Shapes: N flattened tokens, D hidden, V vocabulary, K top tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv3.checkpoint.hf import load
from dsv3.common.errors import UserError
from dsv3.config.distill import TeacherSection
from dsv3.config.model import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.model import DeepSeekV3
from dsv3.ops.cross_entropy import CHUNK_ELEMENTS, IGNORE


def topk_kl(student_NV: Tensor, teacher_NV: Tensor, k: int) -> Tensor:
    """Sum over tokens of KL(teacher || student) on the teacher's top ``k`` and the rest; an FP32 scalar.

    Logits ``[N, V]`` in any float dtype.
    """
    q_NV = torch.log_softmax(student_NV.float(), dim=-1)
    p_NV = torch.log_softmax(teacher_NV.float(), dim=-1)
    if k >= p_NV.shape[1]:
        return (p_NV.exp() * (p_NV - q_NV)).sum()
    index_NK = p_NV.topk(k, dim=-1).indices
    p_NX, q_NX = (
        torch.cat((log_NV.gather(1, index_NK), _others(log_NV, index_NK)), dim=1) for log_NV in (p_NV, q_NV)
    )
    return (p_NX.exp() * (p_NX - q_NX)).sum()


def _others(log_NV: Tensor, index_NK: Tensor) -> Tensor:
    """Logarithm of the probability of all tokens but ``index_NK``, ``[N, 1]``."""
    return log_NV.scatter(1, index_NK, float("-inf")).logsumexp(dim=1, keepdim=True)


def linear_topk_kl(
    student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor, k: int
) -> Tensor:
    """:func:`topk_kl` of two heads, by chunks: logits of all tokens never exist together.

    States and head of the student (``D`` wide) and of the teacher (``E`` wide). Gradients flow to the
    student's only; its logits are computed again in the backward.
    """

    def chunk(h_ND: Tensor, w_VD: Tensor, t_NE: Tensor) -> Tensor:
        return topk_kl(h_ND @ w_VD.to(h_ND.dtype).T, t_NE @ teacher_VE.to(t_NE.dtype).T, k)

    rows = max(1, CHUNK_ELEMENTS // student_VD.shape[0])
    parts = [
        checkpoint(chunk, h_ND, student_VD, t_NE, use_reentrant=False)
        for h_ND, t_NE in zip(student_ND.split(rows), teacher_NE.detach().split(rows))
    ]
    return torch.stack(parts).sum()


class Teacher:
    """A frozen model with the student's tokenizer, asked along with every batch."""

    def __init__(self, model: DeepSeekV3, options: TeacherSection):
        self.model, self.weight, self.top_k = (
            model.eval().requires_grad_(False),
            options.weight,
            options.top_k,
        )

    @classmethod
    def load(
        cls, options: TeacherSection, tokenizer: Tokenizer, vocab_size: int, device: torch.device
    ) -> Teacher | None:
        """The teacher of a recipe, None without one.

        Raises :class:`UserError` unless its tokenizer and its ``vocab_size`` are the student's.
        """
        if options.path is None:
            return None
        theirs = ModelConfig.from_pretrained(options.path).vocab_size
        if theirs != vocab_size:
            raise UserError(
                f"teacher.path ({options.path}) has vocab_size {theirs}; set --model.vocab_size to it"
            )
        if Tokenizer.load(Path(options.path)).token_bytes != tokenizer.token_bytes:
            raise UserError(
                f"teacher.path ({options.path}) has another tokenizer than the student; let it write answers"
                " instead (dsv3 distill)"
            )
        return cls(load(options.path, device=device), options)

    def divergence(
        self,
        student: DeepSeekV3,
        states_BTD: Tensor,
        ids_BT: Tensor,
        labels_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Sum of :func:`topk_kl` over the positions whose label bears loss."""
        with torch.no_grad():
            states, _ = self.model.hidden_states(
                ids_BT, positions_BT=positions_BT, documents_BT=documents_BT, mtp=False
            )
        counted = labels_BT != IGNORE
        return linear_topk_kl(
            states_BTD[counted], student.lm_head.weight, states[0][counted], self.model.lm_head.weight,
            self.top_k,
        )  # fmt: skip
