"""From logits to tokens: penalties, biases, temperature, cuts, and draws that depend on the request alone.

A request's random numbers are a function of its seed, of the place in the text and of their purpose. So an
answer does not depend on what else is in the batch, how its prompt was cut or whether it was preempted.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.serve.grammar import forbidden
from dsv3.serve.params import SamplingParams
from dsv3.serve.sequence import Sequence, TokenLogprob

SAMPLE, ACCEPT, DRAFT = 0, 1, 2  # what a random number is for
HEAD = 1024  # tokens looked at first for top-p
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of splitmix64: 64 bits in, 64 well mixed bits out."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, place: int, purpose: int) -> float:
    """A number in [0, 1) for a place in a text; 48 bits, so that times a total it stays below the total."""
    x = _mix((seed & _MASK) + 0x9E3779B97F4A7C15 & _MASK)
    return (_mix(x + 0x9E3779B97F4A7C15 * (4 * place + purpose + 1) & _MASK) >> 16) * 2.0**-48


@dataclass(frozen=True)
class Row:
    """One row of logits: what follows the tokens of ``sequence`` and then the tokens of ``guessed``."""

    sequence: Sequence
    guessed: tuple[int, ...] = ()

    @property
    def place(self) -> int:
        """Place in the text of the token to choose."""
        return len(self.sequence.tokens) + len(self.guessed)


def adjust(logits_RV: Tensor, rows: Many[Row]) -> Tensor:
    """FP32 logits with penalties, biases and grammars; a new tensor where there are any."""
    held = [(n, (row.sequence.matcher, row.guessed)) for n, row in enumerate(rows) if row.sequence.matcher]
    if not held and not any(row.sequence.params.penalised or row.sequence.params.logit_bias for row in rows):
        return logits_RV
    logits_RV = logits_RV.clone()
    for logits_V, row in zip(logits_RV, rows):
        params = row.sequence.params
        if params.penalised:
            _penalise(logits_V, row, params)
        known = {token: bias for token, bias in params.logit_bias.items() if token < len(logits_V)}
        if known:
            ids = torch.tensor(list(known), device=logits_V.device)
            logits_V[ids] += torch.tensor(list(known.values()), device=logits_V.device)
    if held:
        masks_RV = forbidden([place for _, place in held], logits_RV.shape[-1]).to(logits_RV.device)
        for (number, _), mask_V in zip(held, masks_RV):
            logits_RV[number].masked_fill_(mask_V, float("-inf"))
    return logits_RV


def _penalise(logits_V: Tensor, row: Row, params: SamplingParams) -> None:
    sequence, size, device = row.sequence, len(logits_V), logits_V.device
    if params.repetition_penalty != 1:
        seen = torch.tensor([*sequence.tokens, *row.guessed], device=device).unique()
        seen = seen[seen < size]
        found = logits_V[seen]
        factor = params.repetition_penalty
        logits_V[seen] = torch.where(found > 0, found / factor, found * factor)
    if params.presence_penalty or params.frequency_penalty:
        answer = torch.tensor([*sequence.answer, *row.guessed], dtype=torch.int64, device=device)
        counts_V = torch.bincount(answer, minlength=size)[:size]
        logits_V -= params.frequency_penalty * counts_V + params.presence_penalty * (counts_V > 0)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def probabilities(logits_RV: Tensor, params: Many[SamplingParams]) -> Tensor:
    """What each row is drawn from: temperature, then top-k, top-p and min-p; FP32 ``[R, V]``.

    Greedy rows put everything on the likeliest token. Tokens as likely as the last one kept are kept too.
    """
    scaled_RV = logits_RV / _column([p.temperature or 1.0 for p in params], logits_RV)
    cut = [number for number, p in enumerate(params) if p.top_k or p.top_p < 1]
    if cut or any(p.min_p for p in params):
        shares = _column([p.min_p for p in params], scaled_RV)
        least_R1 = scaled_RV.amax(dim=-1, keepdim=True) + shares.log()  # -inf without min-p
        if cut:
            last = _last_kept(scaled_RV[cut], [params[number] for number in cut], HEAD)
            least_R1[cut] = least_R1[cut].maximum(last)
        scaled_RV = scaled_RV.masked_fill(scaled_RV < least_R1, float("-inf"))
    found = scaled_RV.softmax(dim=-1)
    greedy = [number for number, p in enumerate(params) if p.greedy]
    if greedy:
        best = logits_RV[greedy].argmax(dim=-1, keepdim=True)
        found[greedy] = torch.zeros_like(found[greedy]).scatter_(-1, best, 1.0)
    return found


def _last_kept(scaled_RV: Tensor, params: Many[SamplingParams], head: int) -> Tensor:
    """The least logit that top-k and top-p keep, ``[R, 1]``, sought among the ``head`` likeliest.

    Sorting a whole vocabulary of 129,280 takes as long as much of the model (31 ms a row on one thread, the
    1,024 likeliest 1 ms); they nearly always hold the mass top-p asks for. If not, all are sorted.
    """
    size = scaled_RV.shape[-1]
    head = min(size, max(head, *(p.top_k for p in params)))
    ordered = scaled_RV.topk(head, dim=-1)[0]
    k = _column([p.top_k or size for p in params], ordered)
    ordered = ordered.masked_fill(torch.arange(head, device=ordered.device) >= k, float("-inf"))
    # Top-p is a share of what top-k leaves: of everything where there is no top-k.
    left = torch.where(k < size, ordered.logsumexp(-1, True), scaled_RV.logsumexp(-1, True))
    shares = (ordered - left).exp()
    sums = shares.cumsum(dim=-1)
    limit = _column([p.top_p if p.top_p < 1 else 2.0 for p in params], sums)  # rounding may exceed 1
    if head < size and ((sums[:, -1:] < limit) & (limit < 1) & (k >= size)).any():
        return _last_kept(scaled_RV, params, size)
    kept = (sums - shares < limit) & (ordered > float("-inf"))
    return ordered.gather(1, kept.sum(dim=-1, keepdim=True) - 1)


def draw(weights_RV: Tensor, uniforms: Many[float]) -> list[int]:
    """A token a row, by the inverse of the cumulated weights (any positive total)."""
    sums_RV = weights_RV.double().cumsum(dim=-1)
    points = torch.tensor(uniforms, dtype=torch.float64, device=sums_RV.device)[:, None] * sums_RV[:, -1:]
    found: list[int] = torch.searchsorted(sums_RV, points, right=True)[:, 0].tolist()
    return found


def best(logits_RV: Tensor) -> list[int]:
    """The token of the greatest logit in each row; the first of equal ones."""
    if logits_RV.device.type == "cpu":  # where torch's own takes 25 times as long
        return logits_RV.numpy().argmax(axis=-1).tolist()
    return logits_RV.argmax(dim=-1).tolist()


def choose(logits_RV: Tensor, rows: Many[Row], purpose: int = SAMPLE) -> tuple[list[int], Tensor | None]:
    """A token for each row, and the distributions they were drawn from (None if all rows are greedy)."""
    logits_RV = adjust(logits_RV, rows)
    params = [row.sequence.params for row in rows]
    if all(p.greedy for p in params):
        return best(logits_RV), None
    weights_RV = probabilities(logits_RV, params)
    return draw(weights_RV, [uniform(row.sequence.seed, row.place, purpose) for row in rows]), weights_RV


def logprobs(logits_RV: Tensor, tokens: Many[int], counts: Many[int]) -> list[TokenLogprob]:
    """Logarithms of the model's own probabilities: of the token of each row, and of the ``counts`` best."""
    logs_RV = logits_RV.log_softmax(dim=-1)
    ids = torch.tensor(tokens, device=logits_RV.device)
    own = logs_RV.gather(1, ids[:, None])[:, 0].tolist()
    best, best_ids = logs_RV.topk(min(max(counts), logs_RV.shape[-1]), dim=-1)
    tops = [list(zip(i[:n], v[:n])) for i, v, n in zip(best_ids.tolist(), best.tolist(), counts)]
    return [TokenLogprob(*found) for found in zip(tokens, own, tops)]
