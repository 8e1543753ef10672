"""The report's own kind of reward model (5.2): a language model writes its reasoning, then a score.

It is asked several times and votes with itself: the score is the mean of its judgements. Where a judgement
cannot be read it is asked for again, a few times; a text without any has no score. The same serves as
feedback on open questions, which no rule can check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.common.progress import Progress
from dsv3.config.distill import ExpertSection, SamplingSection
from dsv3.data.special import END_THINK, THINK
from dsv3.evaluate.experts import Expert, Question, open_expert
from dsv3.evaluate.preferences import Accuracy, accuracy, group_of
from dsv3.evaluate.rewards.functions import text_of
from dsv3.evaluate.tasks import Solution
from dsv3.evaluate.verify import boxed, outside_thought, quantity

HIGHEST = 10
TEMPLATE = (
    "Judge the answer to the question. First think, between <think> and </think>: what would be right, and"
    f" what was written. Then give a whole number from 0, useless, to {HIGHEST}, right and clear, in"
    " \\boxed{{}}.\n\n# Question\n{question}\n\n# Answer\n{answer}"
)


def judgement_prompt(question: str, answer: str) -> str:
    """What a judge is asked."""
    return TEMPLATE.format(question=question.strip(), answer=answer.strip())


def written_judgement(solution: Solution, answer: str, score: float) -> str:
    """A judgement as it ought to be written, to train a judge: the worked solution, what was given, a score.

    ``score`` from 0 to 1 is the verifier's; the reasoning is the solution's, so that what the model learns is
    to work the problem before it looks at the answer.
    """
    given = boxed(outside_thought(answer))
    wrote = "no answer" if given is None else given
    thoughts = f"{solution.reasoning}\nright: {solution.answer}\nwritten: {wrote}"
    return f"{THINK}\n{thoughts}\n{END_THINK}\n\n\\boxed{{{round(score * HIGHEST)}}}"


def parse_score(judgement: str) -> float | None:
    """The boxed number after the reasoning, as a share of the highest; None where there is none in range."""
    found = boxed(outside_thought(judgement))
    number = None if found is None else quantity(found.strip().removesuffix(f"/{HIGHEST}"))
    if number is None or number.unit or not 0 <= number.value <= HIGHEST:
        return None
    return float(number.value / HIGHEST)


class Judge:
    """Scores answers by asking a model, ``sampling.samples`` votes each; a reward function as TRL's are.

    ``tries``: how often in all an answer whose judgements cannot be read, none of them, is judged.
    """

    __name__ = "judge"  # what the metrics call it

    def __init__(self, expert: Expert, tries: int = 2):
        self.expert, self.tries = expert, tries

    @classmethod
    def open(
        cls, options: ExpertSection, votes: int = 4, temperature: float = 0.7, max_tokens: int = 512,
        seed: int = 0, tries: int = 2,
    ) -> Judge:  # fmt: skip
        """A judge that is a model folder or an endpoint."""
        sampling = SamplingSection(samples=votes, temperature=temperature, max_tokens=max_tokens)
        return cls(open_expert(options, sampling, "", seed), tries)

    def votes(
        self, prompts: Sequence[str], answers: Sequence[str], progress: Progress | None = None
    ) -> list[list[float]]:
        """The scores (0 to 1) that could be read, of each answer; none where none could."""
        found: dict[str, list[float]] = {}
        keys = [
            hashlib.sha256(json.dumps([prompt, answer]).encode()).hexdigest()[:16]
            for prompt, answer in zip(prompts, answers)
        ]
        for attempt in range(self.tries):
            left = {
                key: judgement_prompt(prompt, answer)
                for key, prompt, answer in zip(keys, prompts, answers)
                if not found.get(key)
            }
            questions = {f"{key}-{attempt}": (key, text) for key, text in left.items()}
            asked = [Question(name, text) for name, (_, text) in questions.items()]
            for question, said in self.expert.answer(asked):
                scores = [parse_score(reply.text) for reply in said if reply.finish_reason == "stop"]
                found[questions[question.id][0]] = [score for score in scores if score is not None]
                if progress is not None:
                    progress.advance(0 if attempt else 1)
        return [found.get(key, []) for key in keys]

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """The mean vote of each completion, None where no judgement could be read."""
        # The judged text is what a reader sees: the reasoning before the answer is left out.
        answers = [outside_thought(text_of(completion)) for completion in completions]
        votes = self.votes([text_of(prompt) for prompt in prompts], answers)
        return [_mean(scores) for scores in votes]


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None


def judge_pairs(judge: Judge, rows: Sequence[Mapping[str, Any]]) -> tuple[Accuracy, list[dict[str, Any]]]:
    """How often the judge scores ``chosen`` above ``rejected``; and the rows with all votes and scores.

    The two answers are judged apart, so that the order they stand in has no part in it.
    """
    prompts = [text_of(row["prompt"]) for row in rows]
    answers = {name: [outside_thought(text_of(row[name])) for row in rows] for name in ("chosen", "rejected")}
    different = set(zip(prompts * 2, [*answers["chosen"], *answers["rejected"]]))
    with Progress("judge", len(different), "answers") as progress:
        votes = judge.votes(prompts * 2, [*answers["chosen"], *answers["rejected"]], progress)
    chosen, rejected = votes[: len(rows)], votes[len(rows) :]
    judged = [
        {
            "prompt": prompt, "chosen": good, "rejected": bad, "chosen_votes": for_good,
            "rejected_votes": for_bad, "chosen_score": _mean(for_good), "rejected_score": _mean(for_bad),
        }
        for prompt, good, bad, for_good, for_bad in zip(
            prompts, answers["chosen"], answers["rejected"], chosen, rejected
        )
    ]  # fmt: skip
    groups = [group_of(row["prompt"]) for row in rows]
    return accuracy([*map(_mean, chosen)], [*map(_mean, rejected)], groups), judged
