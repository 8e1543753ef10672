"""``dsv3 distill``: an expert answers, rejection sampling keeps, training data comes out (report 5.1).

``attempts.jsonl`` is the run's only state: all answers to a prompt are appended together, a line each, and
are on the disk before the next. Whatever else the folder holds is made from it at the end: ``samples.jsonl``
(what ``dsv3 sft`` takes), ``pairs.jsonl`` (what ``dsv3 reward`` takes), ``judgements.jsonl`` (what makes a
judge of a model, by ``dsv3 sft``), ``report.json`` and plots.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsv3.common.errors import UserError
from dsv3.common.files import write_atomic, write_json
from dsv3.common.progress import Progress
from dsv3.config import recipe as recipes
from dsv3.config.distill import DistillRecipe, PromptsSection, RejectionSection
from dsv3.data import rows
from dsv3.evaluate import tasks
from dsv3.evaluate.experts import Answer, Expert, Question, Solver, open_expert
from dsv3.evaluate.judge import judgement_prompt, written_judgement
from dsv3.evaluate.rejection import ERROR, WRONG, judge, select
from dsv3.evaluate.rewards import Rewards, boxed_reward, task_reward
from dsv3.evaluate.tasks.draw import different
from dsv3.evaluate.verify import outside_thought
from dsv3.train.distill_report import draw, summary

Attempt = dict[str, Any]  # a line of attempts.jsonl


def questions_of(options: PromptsSection) -> list[Question]:
    """Every different prompt of a recipe, in a fixed order. Raises :class:`UserError` naming what is bad."""
    found: dict[str, Question] = {}
    for wanted in options.tasks:
        task = tasks.get(wanted.name, wanted.difficulty, options.seed)
        examples = list(different(task, wanted.count, options.split, known=found))
        if len(examples) < wanted.count:
            raise UserError(
                f"prompts.tasks: {wanted.name} at difficulty {wanted.difficulty} has no more than"
                f" {len(examples)} new {options.split} prompts; set count ({wanted.count}) to"
                f" {len(examples)} at most"
            )
        for example in examples:
            solution = task.solve(example)
            original = solution.plain() if solution else None
            found[example.id] = Question(example.id, example.prompt, example.row(), solution, original)
    if options.file is not None:
        for question in read_questions(options.file):
            found.setdefault(question.id, question)
    return list(found.values())


def read_questions(path: str) -> Iterator[Question]:
    """Problems of a file of rows; raises :class:`UserError` with file and line."""
    for row, where in rows.read([path]):
        if not isinstance(row.get("prompt"), str):
            raise UserError(f"{where}: prompt must be a text")
        identifier = str(row.get("id") or hashlib.sha256(row["prompt"].encode()).hexdigest()[:16])
        if row.get("task") is not None:
            facts = row.get("metadata")
            try:
                task = tasks.get(str(row["task"]))
                facts = json.loads(facts) if isinstance(facts, str) else dict(facts or {})
                example = tasks.Example(identifier, task.name, row["prompt"], str(row["answer"]), facts)
                solution = task.solve(example)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            except (KeyError, TypeError, ValueError, IndexError):
                raise UserError(
                    f"{where}: answer and metadata must be those of task {row['task']}, as dsv3 tasks show"
                    " --json has them"
                ) from None
            original = solution.plain() if solution else None
            yield Question(identifier, row["prompt"], example.row(), solution, original)
            continue
        gold = row.get("solution", row.get("answer"))
        if gold is None or isinstance(gold, (dict, list, bool)):
            raise UserError(f"{where}: needs solution or answer, or nothing can tell right from wrong")
        original = str(row["solution"]) if "solution" in row else f"\\boxed{{{gold}}}"
        yield Question(identifier, row["prompt"], {"solution": str(gold)}, None, original)


def scores_of(question: Question, texts: Sequence[str]) -> list[float | None]:
    """What the question's verifier says of each text; None where it broke on one."""
    columns = {key: [value] * len(texts) for key, value in question.row.items() if key != "prompt"}
    rewards = Rewards({"task": task_reward, "boxed": boxed_reward}, on_crash="skip")
    return rewards([question.prompt] * len(texts), texts, **columns).total


def attempts_of(question: Question, answers: Sequence[Answer], options: RejectionSection) -> list[Attempt]:
    """The lines of one prompt: its answers, scored, each kept (``dropped`` null) or dropped for a reason."""
    scores = scores_of(question, [answer.text for answer in answers])
    lines = [
        {
            "id": question.id, "task": question.row.get("task"), "prompt": question.prompt, "sample": sample,
            "response": answer.text, "score": score, "dropped": None, "finish_reason": answer.finish_reason,
            "characters": len(answer.text), "tokens": answer.tokens, "error": answer.error,
        }
        for sample, (answer, score) in enumerate(zip(answers, scores))
    ]  # fmt: skip
    return decided(lines, options)


def decided(lines: list[Attempt], options: RejectionSection) -> list[Attempt]:
    """One prompt's lines with ``dropped`` by these options: judged again without asking anyone."""
    texts = [line["response"] for line in lines]
    reasons = [
        judge(line["response"], line["prompt"], line["finish_reason"], line["score"], options)
        for line in lines
    ]
    chosen = select(texts, reasons, options.keep)
    return [{**line, "dropped": reason} for line, reason in zip(lines, chosen)]


def samples_of(
    question: Question, lines: Sequence[Attempt], system: str, originals: bool = True
) -> Iterator[dict[str, Any]]:
    """Both kinds of the report: <problem, original>; <system prompt, problem, reasoning> a kept answer.

    ``originals``: the first kind too.
    """
    ask = {"role": "user", "content": question.prompt}
    facts = {"id": question.id, "task": question.row.get("task")}
    if originals and question.original is not None:
        answer = {"role": "assistant", "content": question.original}
        yield {"messages": [ask, answer], "kind": "original", **facts}
    for line in lines:
        if line["dropped"] is None:
            start = [{"role": "system", "content": system}] if system else []
            answer = {"role": "assistant", "content": line["response"]}
            yield {"messages": [*start, ask, answer], "kind": "reasoned", **facts}


def pairs_of(question: Question, lines: Sequence[Attempt], system: str) -> Iterator[dict[str, Any]]:
    """Preferences: each different wrong answer against a kept one, as conversations (TRL's columns)."""
    kept = [line["response"] for line in lines if line["dropped"] is None]
    wrong = dict.fromkeys(line["response"] for line in lines if line["dropped"] == WRONG)
    for at, text in enumerate(wrong if kept else ()):
        yield {
            "prompt": question.messages(system),
            "chosen": [{"role": "assistant", "content": kept[at % len(kept)]}],
            "rejected": [{"role": "assistant", "content": text}],
            "id": question.id,
            "task": question.row.get("task"),
        }


def judgements_of(question: Question, lines: Sequence[Attempt]) -> Iterator[dict[str, Any]]:
    """Judgements as a judge ought to write them: of each kept answer, and of as many different wrong ones."""
    if question.solution is None or not question.solution.reasoning:
        return
    kept = [line for line in lines if line["dropped"] is None]
    wrong = {outside_thought(line["response"]): line for line in lines if line["dropped"] == WRONG}
    for line in [*kept, *list(wrong.values())[: len(kept)]]:
        answer = outside_thought(line["response"])
        yield {
            "messages": [
                {"role": "user", "content": judgement_prompt(question.prompt, answer)},
                {
                    "role": "assistant",
                    "content": written_judgement(question.solution, answer, line["score"] or 0.0),
                },
            ],
            "kind": "judgement",
            "id": question.id,
            "task": question.row.get("task"),
        }


def distill(recipe: DistillRecipe, resume: bool = False, expert: Expert | None = None) -> dict[str, Any]:
    """Ask, judge, write; returns what ``report.json`` holds.

    ``resume`` goes on with a folder that holds attempts of the same recipe; answers that were errors are
    asked for again, and ``rejection`` may be other than before: all is judged anew. Raises :class:`UserError`
    before anything is written, :class:`Failure` where an endpoint gives no answers.
    """
    out = Path(recipe.out)
    journal = out / "attempts.jsonl"
    questions = {question.id: question for question in questions_of(recipe.prompts)}
    done = _read(recipe, journal, questions, resume)
    left = [question for question in questions.values() if question.id not in done]
    if isinstance(expert, Solver) or recipe.expert.kind == "solver":
        unsolved = next((q for q in left if q.solution is None), None)
        if unsolved is not None:
            raise UserError(
                f"expert.kind (solver) knows no steps for prompt {unsolved.id}; use engine or endpoint"
            )
    if left:
        expert = expert or open_expert(recipe.expert, recipe.sampling, recipe.system, recipe.seed)
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out ({out}) cannot be made: {error.strerror}") from None
    write_atomic(out / "recipe.yaml", recipes.dump(recipe))
    write_atomic(journal, "".join(_text(line) for lines in done.values() for line in lines))

    answered = sum(any(line["dropped"] is None for line in lines) for lines in done.values())
    with (
        Progress("distill", len(questions), "prompts", done=len(done)) as progress,
        open(journal, "ab") as file,
    ):
        for question, answers in expert.answer(left) if expert and left else ():
            lines = attempts_of(question, answers, recipe.rejection)
            file.write("".join(map(_text, lines)).encode())
            file.flush()
            os.fsync(file.fileno())
            done[question.id] = lines
            answered += any(line["dropped"] is None for line in lines)
            progress.note(f"{answered / len(done):.0%} answered")
            progress.advance(1)
    return _finish(recipe, questions, done)


def _finish(
    recipe: DistillRecipe, questions: Mapping[str, Question], done: Mapping[str, list[Attempt]]
) -> dict[str, Any]:
    """The files made from the attempts, in the order of the prompts, whatever came first."""
    out = Path(recipe.out)
    ordered = [(question, done[identifier]) for identifier, question in questions.items()]
    samples = [line for pair in ordered for line in samples_of(*pair, recipe.system, recipe.originals)]
    pairs = [line for pair in ordered for line in pairs_of(*pair, recipe.system)]
    write_atomic(out / "samples.jsonl", "".join(map(_text, samples)))
    write_atomic(out / "pairs.jsonl", "".join(map(_text, pairs)))
    judgements = [line for pair in ordered for line in judgements_of(*pair)]
    write_atomic(out / "judgements.jsonl", "".join(map(_text, judgements)))
    attempts = [line for _, lines in ordered for line in lines]
    report = {
        **summary(attempts),
        "samples": len(samples),
        "pairs": len(pairs),
        "judgements": len(judgements),
    }
    write_json(out / "report.json", report)
    draw(attempts, out / "plots")
    return report


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


# Of a run that goes on: what does not change an answer.
_MAY_CHANGE = {"out", "rejection", "originals"}
_CONNECTION = {"base_url", "api_key_variable", "concurrency", "timeout", "retries", "give_up"}


def _read(
    recipe: DistillRecipe, journal: Path, questions: Mapping[str, Question], resume: bool
) -> dict[str, list[Attempt]]:
    """Prompts whose answers are all there, judged by the recipe of now."""
    if not journal.exists():
        return {}
    if not resume:
        raise UserError(
            f"out ({journal.parent}) already holds attempts: go on with --resume auto, or choose another"
            " --out"
        )
    before = yaml.safe_load((journal.parent / "recipe.yaml").read_text(encoding="utf-8"))
    now = recipe.model_dump(mode="json")
    for tree in (before, now):
        tree["expert"] = {k: v for k, v in tree.get("expert", {}).items() if k not in _CONNECTION}
    changed = [key for key in now if key not in _MAY_CHANGE and before.get(key) != now[key]]
    if changed:
        name, was, asked = recipes.differences(before.get(changed[0]), now[changed[0]], changed[0])[0]
        raise UserError(
            f"{name} ({asked}) differs from the run in {journal.parent} ({was});"
            " use its recipe.yaml, or another --out"
        )
    found: dict[str, list[Attempt]] = {}
    for raw in journal.read_bytes().split(b"\n")[:-1]:  # what follows the last line break was cut off
        line = json.loads(raw)
        found.setdefault(line["id"], []).append(line)
    return {
        identifier: decided(lines, recipe.rejection)
        for identifier, lines in found.items()
        if identifier in questions
        and len(lines) == recipe.sampling.samples
        and all(line["finish_reason"] != ERROR for line in lines)
    }
