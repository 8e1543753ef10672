"""lm-evaluation-harness (extra ``[eval]``, 0.4.13) over our engine: its ``--model dsv3``.

``python -m dsv3.evaluate.benchmarks.harness run --model dsv3 --model_args path=FOLDER --tasks ...`` is
lm-eval's own command line with this model known to it; where lm-eval is called from Python, importing this
module is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dsv3.data.chat import render
from dsv3.evaluate.benchmarks.likelihood import Pair, likelihoods
from dsv3.serve.llm import LLM
from dsv3.serve.params import SamplingParams

ROUND = 128  # requests between two moves of the bar


@register_model("dsv3")
class Dsv3LM(TemplateLM):
    """``path``: a Hugging Face folder with its tokenizer (or ``llm``: one that is open). ``quantize``: fp8,
    int8 or int4. Control tokens written out in a text are read as such, as Hugging Face's tokenizers do.
    """

    def __init__(
        self,
        path: str = "",
        quantize: str | None = None,
        max_gen_toks: int = 256,
        llm: LLM | None = None,
        **_: Any,  # batch_size, device: the engine makes its own batches
    ):
        super().__init__()
        self.llm = llm or LLM(path, quantize=quantize)
        assert self.llm.tokenizer is not None
        self.tokens = self.llm.tokenizer
        self.max_gen_toks = int(max_gen_toks)
        self.path = path

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation at most."""
        return self.llm.engine.max_length

    @property
    def eot_token_id(self) -> int:
        """End of sentence."""
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return f"dsv3-{self.path}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; nothing is added."""
        return self.tokens.encode(string, special=True)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without ``add_generation_prompt`` its last message is to be continued."""
        return render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final=not add_generation_prompt,
        ).text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The format is ours alone."""
        return "dsv3" if chat_template else ""

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for start in range(0, len(requests), ROUND):
            few = requests[start : start + ROUND]
            scored = likelihoods(
                self.llm, [Pair(context + wanted, len(context)) for _, context, wanted in few]
            )
            found += [(one.logprob, one.greedy) for one in scored]
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap but for one token."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop text; a context that leaves no room for one loses its beginning."""
        prompts, wishes = [], []
        for request in requests:
            context, wanted = request.args
            length = int(wanted.get("max_gen_toks", self.max_gen_toks))
            until = wanted.get("until") or []
            room = max(1, self.max_length - length)
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            wishes.append(
                SamplingParams(
                    max_tokens=length,
                    temperature=float(wanted.get("temperature", 1.0)) if wanted.get("do_sample") else 0.0,
                    top_p=float(wanted.get("top_p", 1.0)),
                    seed=0,
                    stop=[until] if isinstance(until, str) else [text for text in until if text],
                )
            )
        return [out.text for out in self.llm.generate(prompts, wishes, progress=not disable_tqdm)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
