"""What a request asks for, checked before any work."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv3.common.errors import UserError

TOP_LOGPROBS = 20  # alternatives a position at most, as in OpenAI's API
GRAMMAR_BYTES = 64 * 1024  # of a schema or a grammar at most


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The names are those of OpenAI's API and of the other serving engines.

    ``temperature`` 0 takes the likeliest token. ``top_k`` 0 and ``top_p`` 1 keep every token; ``min_p`` drops
    tokens less likely than that share of the likeliest. ``repetition_penalty`` divides the positive logits
    (and multiplies the negative ones) of tokens in the prompt or the answer; ``presence_penalty`` and
    ``frequency_penalty`` are subtracted once, or once an occurrence, for tokens of the answer. ``logit_bias``
    is added to the logits of the token ids it names.

    ``seed`` makes the answer repeatable, whatever else is in the batch (sampled with drafts and without, the
    tokens differ; greedy they do not); None draws a new one. ``n`` answers a prompt. ``stop``: texts that end
    the answer and are left out of it; ``stop_token_ids``: tokens that end it, beside end of sentence, which
    ``ignore_eos`` takes for an ordinary one. ``logprobs``: None for none, else how many alternatives beside
    the chosen token; ``prompt_logprobs`` the same for the prompt's own tokens, those before place
    ``prompt_logprobs_from`` left out (what they share with other prompts can then come from the cache).
    ``max_tokens`` 0 adds none: the prompt is only read. ``skip_special``: leave control tokens out of the
    text.

    ``json_schema``: the answer is a JSON document valid under this schema (``{"type": "object"}``: any
    object); ``grammar``: it is a text of this grammar, in llguidance's Lark, which names control tokens by
    their strings. End of sentence then comes where the document may end, and ends it, ``ignore_eos`` or not.
    An answer that ends with stop is whole, unless a stop text or token ended it; one cut off, with length.

    Raises :class:`UserError` naming the field.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special: bool = True
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(text, str) and text for text in stops):
            raise UserError(f"stop ({self.stop!r}) must be a text or a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(stops))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            whole = name in _WHOLE
            if value is None and name in ("seed", "logprobs", "prompt_logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise UserError(f"{name} ({value!r}) must be a {'whole number' if whole else 'number'}")
            if not low <= value <= high:
                limit = f"from {low} to {high}" if math.isfinite(high) else f"at least {low}"
                raise UserError(f"{name} ({value}) must be {limit}")
        for name, least in (("top_p", LEAST_TOP_P), ("repetition_penalty", 0.01)):
            if getattr(self, name) < least:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least {least}; 1 switches it off")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"temperature ({self.temperature}) must be 0, the likeliest token, or at least"
                f" {LEAST_TEMPERATURE}"
            )
        for ids, name in ((self.stop_token_ids, "stop_token_ids"), (self.logit_bias, "logit_bias")):
            if not all(isinstance(number, int) and number >= 0 for number in ids):
                raise UserError(f"{name} ({ids!r}) must name tokens by their ids, 0 or more")
        if not all(_is_finite(bias) for bias in self.logit_bias.values()):
            raise UserError(f"logit_bias ({dict(self.logit_bias)}) must hold finite numbers")
        self._check_grammar()

    def _check_grammar(self) -> None:
        if self.json_schema is not None and self.grammar is not None:
            raise UserError("json_schema and grammar exclude each other; give one of them")
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping):
            raise UserError(f"json_schema ({self.json_schema!r}) must be a JSON object")
        if not isinstance(self.grammar, (str, type(None))):
            raise UserError(f"grammar ({self.grammar!r}) must be a text")
        try:
            size = len((self.constraint or "").encode())
        except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is one
            raise UserError(f"{self.constraint_name} must be plain JSON or text: {error}") from None
        if size > GRAMMAR_BYTES:
            raise UserError(f"{self.constraint_name} has {size} bytes, and at most {GRAMMAR_BYTES} are taken")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def constraint(self) -> str | None:
        """The schema, as JSON, or the grammar; None for a free answer."""
        if self.json_schema is not None:
            return json.dumps(dict(self.json_schema), allow_nan=False, ensure_ascii=False)
        return self.grammar

    @property
    def constraint_name(self) -> str:
        """The field :attr:`constraint` comes from."""
        return "grammar" if self.json_schema is None else "json_schema"


LEAST_TEMPERATURE, LEAST_TOP_P = 1e-4, 1e-6  # FP32 may take less for 0
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 0, math.inf), ("temperature", 0, 100), ("top_p", 0, 1), ("top_k", 0, math.inf),
    ("min_p", 0, 1), ("repetition_penalty", 0, 100), ("presence_penalty", -100, 100),
    ("frequency_penalty", -100, 100), ("seed", 0, 2**63 - 1), ("n", 1, 1024), ("logprobs", 0, TOP_LOGPROBS),
    ("prompt_logprobs", 0, TOP_LOGPROBS), ("prompt_logprobs_from", 1, math.inf),
)  # fmt: skip
_WHOLE = frozenset(
    ("max_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs", "prompt_logprobs_from")
)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
