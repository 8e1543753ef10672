"""An answer in the making moves from one engine to another, with its cache rows: nothing is computed again.

What travels: the request (prompt, parameters, seed), what has been answered so far, the drafts with the
distributions they were drawn from, the cache rows of every token (the MTP module's too) and the states that
are kept at the ends of blocks (see :mod:`dsv3.serve.speculation`). Text and the like are made again from the
tokens. For DeepSeek-V3 and a BF16 cache that is 61 x 1,152 = 70,272 bytes a token, and with drafts
62 x 1,152 + 7,168 x 2 / 16 = 72,320.

Both engines must have the same model and cache format; :func:`layout` is compared before a row is taken.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.common.errors import Failure
from dsv3.serve.engine import Engine
from dsv3.serve.params import SamplingParams
from dsv3.serve.sequence import Sequence, TokenLogprob


@dataclass(frozen=True)
class Handover:
    """``state``: what JSON can say. ``arrays``: ``rows`` [layers, places, width]; with drafts also ``ends``
    [full blocks, D] and, if they were sampled, ``draft_probs`` [drafts, V]."""

    state: dict[str, Any]
    arrays: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def layout(engine: Engine) -> dict[str, Any]:
    """What two engines must have in common: the cache's format, drafts, and the model."""
    model, rows = engine.model, engine.cache.rows
    config = repr(sorted(model.config.to_dict().items())).encode()
    gain = model.model.norm.weight.detach().float().cpu().numpy().tobytes()  # differs between trainings
    return {
        "model": blake2b(config + gain, digest_size=8).hexdigest(),
        "cache": engine.cache.kind,
        "layers": rows.shape[0],
        "width": rows.shape[2],
        "draft_tokens": engine.options.draft_tokens,
        "vocab_size": engine.vocab_size,
        "block_size": engine.blocks.size,
    }


def take(engine: Engine, sequence: Sequence) -> Handover:
    """Take an answer that waits for its next token out of an engine; its blocks are free at once.

    The request stays with the engine until all its answers are taken or have ended.
    """
    assert sequence in engine.scheduler.running and not sequence.finished
    assert sequence.computed == len(sequence.tokens) - 1
    # The MTP module's row for the last token is there already; the main model's is still to come.
    slots = torch.from_numpy(sequence.slots[: sequence.computed + bool(engine.drafter)])
    arrays = {"rows": engine.cache.rows.index_select(1, slots.to(engine.cache.rows.device))}
    if engine.drafter:
        arrays["ends"] = engine.drafter.ends[sequence.blocks[: sequence.computed // engine.blocks.size]]
    if sequence.draft_probs is not None:
        arrays["draft_probs"] = sequence.draft_probs
    scores = sequence.prompt_logprobs
    state = {
        "layout": layout(engine),
        "tokens": sequence.tokens,
        "prompt_length": sequence.prompt_length,
        "params": asdict(sequence.params),
        "seed": sequence.seed,
        "max_length": sequence.max_length,
        "cached_tokens": sequence.cached_tokens,
        "drafts": sequence.drafts,
        "drafted": sequence.drafted,
        "accepted": sequence.accepted,
        "logprobs": logprobs_to_json(sequence.logprobs),
        "prompt_logprobs": scores and logprobs_to_json(scores),
    }
    request = engine.requests[sequence.request_id]
    engine.scheduler.remove(sequence)
    sequence.finish_reason = "handed over"
    if all(other.finished for other in request):
        engine.abort(sequence.request_id)
    return Handover(state, {name: array.cpu().contiguous() for name, array in arrays.items()})


def give(engine: Engine, handover: Handover, request_id: str) -> Sequence | None:
    """Let an engine go on with an answer, as a request of its own; None, and nothing changed, without room.

    Raises :class:`Failure` if it comes of another model or cache.
    """
    state, arrays, blocks = handover.state, handover.arrays, engine.blocks
    ours = layout(engine)
    for name, theirs in state["layout"].items():
        if theirs != ours[name]:
            raise Failure(f"an answer was handed over with {name} {theirs}, and this engine has {ours[name]}")
    tokens, prompt = state["tokens"], state["tokens"][: state["prompt_length"]]
    places = len(tokens) + len(state["drafts"]) + engine.scheduler.ahead
    running = len(engine.scheduler.running)
    if running >= engine.scheduler.max_sequences or -(-places // blocks.size) > blocks.idle - running:
        return None
    engine.add_request(prompt, replace(params_of(state["params"]), n=1), request_id)
    (sequence,) = engine.requests[request_id]
    sequence.seed, sequence.max_length = state["seed"], state["max_length"]
    sequence.extend(tokens[len(prompt) :], logprobs_from_json(state["logprobs"]))
    scores = state["prompt_logprobs"]
    sequence.prompt_logprobs = scores and logprobs_from_json(scores)
    assert not sequence.finished and sequence.tokens == tokens
    sequence.drafts, sequence.draft_probs = list(state["drafts"]), arrays.get("draft_probs")
    if sequence.draft_probs is not None:
        sequence.draft_probs = sequence.draft_probs.to(engine.cache.rows.device)
    sequence.drafted, sequence.accepted = state["drafted"], state["accepted"]
    sequence.cached_tokens = state["cached_tokens"]
    engine.scheduler.remove(sequence)  # it does not wait for its prompt to be computed
    blocks.grow(sequence, places)
    rows = arrays["rows"].to(engine.cache.rows.device)
    slots = torch.from_numpy(sequence.slots[: rows.shape[1]]).to(rows.device)
    engine.cache.rows.index_copy_(1, slots, rows)
    sequence.computed = len(tokens) - 1
    if engine.drafter:
        full = sequence.blocks[: sequence.computed // blocks.size]
        engine.drafter.ends[full] = arrays["ends"].to(engine.drafter.ends.device)
    blocks.register(sequence)
    engine.scheduler.running.append(sequence)
    return sequence


def params_of(state: dict[str, Any]) -> SamplingParams:
    """Parameters that went through JSON."""
    biases = {int(token): bias for token, bias in state["logit_bias"].items()}  # JSON's keys are texts
    return SamplingParams(**{**state, "logit_bias": biases})


def logprobs_to_json(logprobs: Many[TokenLogprob | None]) -> list[Any]:
    """Lists of lists; None for the first token of a prompt."""
    return [found and [found.token_id, found.logprob, found.top] for found in logprobs]


def logprobs_from_json(state: Many[Any]) -> list[Any]:
    """The inverse of :func:`logprobs_to_json`."""
    return [
        found and TokenLogprob(found[0], found[1], [(token, logprob) for token, logprob in found[2]])
        for found in state
    ]


def to_wire(handover: Handover) -> tuple[dict[str, Any], list[memoryview]]:
    """A message, and the bytes of the arrays for the payload of its frame (nothing is copied)."""
    # The wider numbers first: each array then begins at a multiple of its own.
    arrays = sorted(handover.arrays.items(), key=lambda item: -item[1].itemsize)
    kinds = {name: [str(array.dtype).removeprefix("torch."), *array.shape] for name, array in arrays}
    parts = [array.reshape(-1).view(torch.uint8).numpy().data for _, array in arrays]
    return {"state": handover.state, "arrays": kinds}, parts


def from_wire(message: dict[str, Any], payload: memoryview) -> Handover:
    """The handover of :func:`to_wire`; the arrays lie in ``payload``."""
    arrays, begin, flat = {}, 0, torch.from_numpy(np.asarray(payload))
    for name, (kind, *shape) in message["arrays"].items():
        dtype = getattr(torch, kind)
        size = int(np.prod(shape)) * dtype.itemsize
        arrays[name] = flat[begin : begin + size].view(dtype).view(shape)
        begin += size
    if begin != len(payload):
        raise Failure(f"a handover of {begin} bytes came with {len(payload)}")
    return Handover(message["state"], arrays)
