"""Speculative decoding by the MTP module (report 2.2): drafts, and their exact verification.

What the module needs. At place i it joins the main model's state h_i with the embedding of the NEXT token
t_{i+1}, runs its own decoder layer, whose attention sees the joined rows of places 0 .. i, and predicts
t_{i+2}. Its rows are one more layer of the paged cache.

Where its rows lie. The row of (h_i, t_{i+1}) is kept in the slot of place i + 1, not i: it then depends on
the tokens up to the slot's own and on no later one, so that a block can be shared by all texts that begin
with its tokens, MTP rows included. Slot 0 stays empty. Positions are still i, as in training.

When they are computed. After a step of the main model over places [a, b) every token up to t_b is known: the
prompt's own, or the one just sampled. So the module runs over the same places in the same step, filling the
slots a + 1 .. b, and nothing has to be carried over between the chunks of a prompt. There is one exception. A
sequence that begins with m tokens of known blocks finds the slots 1 .. m - 1 filled, and slot m, the first of
its own, wants h_{m-1}, which it has not computed. Therefore the state of the last place of every block is
kept with the block (``ends``), D numbers a block. Preemption is the same case: nothing else survives it.

Drafts. The module's output at the last place is the first draft's logits. For further drafts it runs again on
its own output state (after ``shared_head.norm``) and its own draft, one place on; those rows are provisional
and are written again, from the main model's states, once the tokens are known.

Verification. The main model computes the last token and all drafts in one pass. A draft d with probability
q(d) under the module's distribution and p(d) under the model's is accepted with probability min(1, p(d) /
q(d)); the first one refused is replaced by a draw from max(p - q, 0), normalised; if none is, a further token
comes from the last row. Both p and q are what the request asks for: after temperature, cuts and penalties. So
tokens are distributed as without drafts, and greedy ones are the same.

Shapes: N rows of a batch, R rows of logits, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import chain

import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.serve.attention import Span
from dsv3.serve.cache import LatentCache
from dsv3.serve.layers import Layers
from dsv3.serve.runner import States, first_rows
from dsv3.serve.sampler import (
    ACCEPT,
    DRAFT,
    SAMPLE,
    Row,
    adjust,
    best,
    choose,
    draw,
    probabilities,
    uniform,
)
from dsv3.serve.scheduler import Chunk
from dsv3.serve.sequence import Sequence


def rows_to_choose(sequences: Many[Sequence]) -> list[Row]:
    """The rows of logits each sequence needs: one after each of its drafts, and one before them."""
    return [Row(s, tuple(s.drafts[:place])) for s in sequences for place in range(len(s.drafts) + 1)]


def verify(logits_RV: Tensor, sequences: Many[Sequence]) -> list[list[int]]:
    """The new tokens of each sequence: the drafts that stand, and one more.

    ``logits_RV``: FP32, the rows of :func:`rows_to_choose`.
    """
    rows = rows_to_choose(sequences)
    logits_RV = adjust(logits_RV, rows)
    if all(s.params.greedy for s in sequences):
        tokens = best(logits_RV)
        found, first = [], 0
        for sequence in sequences:
            stands = 0
            while stands < len(sequence.drafts) and sequence.drafts[stands] == tokens[first + stands]:
                stands += 1
            found.append(tokens[first : first + stands + 1])
            first += len(sequence.drafts) + 1
        return found
    weights_RV = probabilities(logits_RV, [row.sequence.params for row in rows])
    accepted, finals, uniforms, first = [], [], [], 0
    for sequence in sequences:
        stop = first + len(sequence.drafts) + 1
        stands, final_V = _stand(sequence, weights_RV[first:stop])
        accepted.append(sequence.drafts[:stands])
        finals.append(final_V)
        uniforms.append(uniform(sequence.seed, len(sequence.tokens) + stands, SAMPLE))
        first = stop
    return [[*drafts, token] for drafts, token in zip(accepted, draw(torch.stack(finals), uniforms))]


def _stand(sequence: Sequence, p_RV: Tensor) -> tuple[int, Tensor]:
    """How many drafts stand, and the weights of the token after them."""
    drafts = sequence.drafts
    if not drafts:
        return 0, p_RV[0]
    chosen = torch.tensor(drafts, device=p_RV.device)[:, None]
    q_RV = sequence.draft_probs
    if q_RV is None:  # greedy: all on the draft
        q_RV = torch.zeros_like(p_RV[:-1]).scatter_(1, chosen, 1.0)
    own = p_RV[:-1].gather(1, chosen)[:, 0].tolist()
    guessed = q_RV.gather(1, chosen)[:, 0].tolist()
    for place, (p, q) in enumerate(zip(own, guessed)):
        if not uniform(sequence.seed, len(sequence.tokens) + place, ACCEPT) * q < p:
            rest_V = (p_RV[place] - q_RV[place]).clamp_(min=0)
            return place, rest_V if rest_V.any() else p_RV[place]  # p == q but for rounding
    return len(drafts), p_RV[-1]


class Drafter:
    """Fills the MTP module's cache rows and drafts up to ``count`` tokens a sequence."""

    def __init__(self, model: DeepSeekV3, cache: LatentCache, count: int, vocab_size: int):
        self.model, self.cache, self.count = model, cache, count
        self.module = model.mtp_modules[0]
        norm = self.module.shared_head.norm
        self.layers = Layers(model, [self.module], model.config.num_hidden_layers, cache, norm)
        self.vocab_size = vocab_size
        embedding = model.model.embed_tokens
        blocks = cache.rows.shape[1] // cache.block
        self.ends = torch.zeros(
            blocks, model.config.hidden_size, device=cache.rows.device,
            dtype=embedding.compute_dtype or embedding.weight.dtype,
        )  # fmt: skip

    def keep_ends(self, chunks: list[Chunk], states: States) -> None:
        """Keep the states of the last places of blocks; of a refused draft it is replaced later."""
        size = self.cache.block
        rows, blocks = [], []
        for chunk, begin in zip(chunks, states.begins):
            for block in range(chunk.start // size, chunk.stop // size):
                rows.append(begin + (block + 1) * size - 1 - chunk.start)
                blocks.append(chunk.sequence.blocks[block])
        if rows:
            self.ends[blocks] = states.hidden_ND[rows]

    def advance(self, chunks: list[Chunk], states: States) -> None:
        """Fill the slots of the tokens that are known now, and draft for sequences that wait for a token."""
        starts, rows, gaps = [], [], []
        for chunk, begin in zip(chunks, states.begins):
            sequence = chunk.sequence
            gap = 0 < chunk.start == sequence.reused
            starts.append(chunk.start - gap)
            gaps.append(gap)
            rows.append(range(begin - gap, begin + sequence.computed - chunk.start))
        spans = [Span(c.sequence.slots, a + 1, c.sequence.computed + 1, 1) for c, a in zip(chunks, starts)]
        begins = first_rows([len(span) for span in rows])
        hidden_ND = states.hidden_ND[list(chain.from_iterable(rows))]
        holes = [number for number, gap in enumerate(gaps) if gap]
        if holes:
            last = [chunks[n].sequence.blocks[starts[n] // self.cache.block] for n in holes]
            hidden_ND[[begins[n] for n in holes]] = self.ends[last]
        ids = list(
            chain.from_iterable(
                chunk.sequence.tokens[start + 1 : chunk.sequence.computed + 1]
                for chunk, start in zip(chunks, starts)
            )
        )
        state_ND = self._predict(ids, hidden_ND, spans)
        wanted, last_rows = [], []
        for number, chunk in enumerate(chunks):
            sequence = chunk.sequence
            if not chunk.samples:
                continue  # a prompt, or one computed again, whose drafts are still good
            sequence.drafts, sequence.draft_probs = [], None
            if not sequence.finished and self._wants(sequence):
                wanted.append(sequence)
                last_rows.append(begins[number] + len(rows[number]) - 1)
        if wanted:
            self._draft(wanted, state_ND[last_rows])

    def _wants(self, sequence: Sequence) -> bool:
        """Whether one more draft could be of use: each pass makes a token more than it has drafts."""
        made = len(sequence.drafts)
        return made < self.count and len(sequence.tokens) + made + 1 < sequence.max_length

    def _draft(self, sequences: list[Sequence], state_ND: Tensor) -> None:
        kept: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in sequences}
        while True:
            logits_RV = self.model.lm_head(state_ND)[:, : self.vocab_size].float()
            guesses, weights_RV = choose(logits_RV, [Row(s, tuple(s.drafts)) for s in sequences], DRAFT)
            for number, (sequence, guess) in enumerate(zip(sequences, guesses)):
                sequence.drafts.append(guess)
                if weights_RV is not None:
                    kept[sequence].append(weights_RV[number])
            going = [number for number, sequence in enumerate(sequences) if self._wants(sequence)]
            if not going:
                break
            sequences, state_ND = [sequences[number] for number in going], state_ND[going]
            ends = [s.computed + len(s.drafts) for s in sequences]
            spans = [Span(s.slots, end, end + 1, 1) for s, end in zip(sequences, ends)]
            state_ND = self._predict([s.drafts[-1] for s in sequences], state_ND, spans)
        for sequence, weights in kept.items():
            if weights and not sequence.params.greedy:
                sequence.draft_probs = torch.stack(weights)

    def _predict(self, ids: list[int], hidden_ND: Tensor, spans: Many[Span]) -> Tensor:
        """:meth:`dsv3.model.mtp.MTPModule.predict` over the cache."""
        embedded_ND = self.model.model.embed_tokens(torch.tensor(ids, device=hidden_ND.device))
        return self.layers.run(spans, self.module.join(embedded_ND, hidden_ND))
