"""The benchmarks, one definition each. Shots and metrics are those of the report's table 3 for the base model
where it has them (marked), ours elsewhere. A definition without ``sources`` reads a file of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv3.evaluate.benchmarks import fields
from dsv3.evaluate.benchmarks.documents import Document


@dataclass(frozen=True)
class Definition:
    """A benchmark as data.

    ``shots``: worked examples in the prompt. ``sources``: where the documents lie in the package; ``pool``:
    where its examples lie: another split; or ``given``, the prompt the package itself has; or empty, the last
    documents, which then are not asked. ``item``: a document's parts by our names (:mod:`.fields`).
    ``judge``: of :mod:`.judges`; empty: choices are ranked. ``head``: begins the prompt; it may name
    ``{group}``, and examples come from documents of the same group. ``told``: what a conversation's question
    ends with.
    """

    metric: str
    shots: int
    item: Callable[[Document], fields.Item]
    sources: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    judge: str = ""
    head: str = ""
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    told: str = ""


def _rank(metric: str, shots: int, *sources: str, pool: str = "", **more: object) -> Definition:
    """Choices already written out: query, choices, gold."""
    return Definition(metric, shots, fields.listed, sources, (pool,) if pool else (), **more)  # type: ignore[arg-type]


def _letters(shots: int) -> Definition:
    return Definition("acc", shots, fields.lettered)


def _short(
    shots: int, item: Callable[[Document], fields.Item], *sources: str, metric: str = "exact_match"
) -> Definition:
    """A short answer on a line of its own."""
    return Definition(
        metric, shots, item, sources, judge="short", max_tokens=64, stop=("\n",),
        told="\nAnswer with as few words as possible.",
    )  # fmt: skip


BOX = "\nPut your final answer within \\boxed{}."
MMLU_HEAD = "The following are multiple choice questions (with answers) about {group}.\n\n"
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip

TABLE: dict[str, Definition] = {
    # Ranked by likelihood. In the report:
    "mmlu": Definition(
        "acc", 5, fields.lettered, ("hf_datasets/hails/mmlu_no_train/*/test",),
        ("hf_datasets/hails/mmlu_no_train/*/dev",), head=MMLU_HEAD,
    ),
    "arc_easy": _rank("acc_norm", 25, "arc_easy/test_rc_5shot", pool="arc_easy/val_rc_5shot"),
    "arc_challenge": _rank("acc_norm", 25, "arc_challenge/test_rc_5shot", pool="arc_challenge/val_rc_5shot"),
    "hellaswag": _rank("acc_norm", 10, "hellaswag/rc_0shot"),
    "piqa": _rank("acc_norm", 0, "piqa/rc_0shot"),
    "winogrande": Definition("acc", 5, fields.blank, ("winogrande/rc_0shot",)),
    # Not in the report:
    "boolq": _rank("acc", 5, "boolq/rc_0shot"),
    "csqa": _rank("acc_norm", 5, "csqa/rc_0shot"),
    "openbookqa": _rank("acc_norm", 5, "openbookqa/test_rc_5shot"),
    "sciq": _rank("acc_norm", 5, "sciq/rc_5shot"),
    "socialiqa": _rank("acc_norm", 5, "socialiqa/rc_0shot"),
    "medqa": _rank("acc_norm", 5, "medqa_en/rc_5shot"),
    "medmcqa": _rank("acc_norm", 5, "medmcqa/rc_5shot"),
    "lambada": _rank("acc", 0, "lambada/bpb_0shot"),
    # Small skills, which tiny models can show:
    **{
        f"basic_{skill}": _rank("acc_norm", 5, f"basic_skills_{skill}/rc_5shot")
        for skill in (
            "arithmetic", "coding", "common_knowledge", "logical_reasoning", "pattern", "string_operations",
        )
    },
    # Answered freely. In the report:
    "triviaqa": _short(5, fields.trivia, "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation"),
    "naturalqs": _short(5, fields.asked, "hf_datasets/nq_open/none/validation"),
    "drop": _short(3, fields.drop, "drop/bpb_5shot", metric="f1"),
    "gsm8k": Definition(
        "exact_match", 8, fields.gsm8k, ("gsm8k/gold_bpb_5shot",), ("given",), judge="number", max_tokens=320,
        stop=("\n\n", "Question:"), told=BOX,
    ),
    "math": Definition(
        "exact_match", 4, fields.math, tuple(f"minerva_math_{name}/gold_bpb_0shot" for name in SUBJECTS),
        ("given",), judge="math", max_tokens=768, stop=("\nProblem:",), told=BOX,
    ),
    "humaneval": Definition(
        "pass@1", 0, fields.humaneval, ("codex_humaneval/gold_bpb_0shot",), judge="code", max_tokens=512,
        stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```"),
        told="\n\nComplete this function; answer with the whole program in one block.",
    ),
    "mbpp": Definition(
        "pass@1", 3, fields.mbpp, ("codex_mbpp/gold_bpb_0shot",), judge="code", max_tokens=512,
        stop=("[DONE]",), told="\n\nAnswer with the program in one block.",
    ),
    # Not in the report:
    "math_500": Definition(
        "exact_match", 4, fields.math, ("minerva_math_500/gold_bpb_0shot",), ("given",), judge="math",
        max_tokens=768, stop=("\nProblem:",), told=BOX,
    ),
    "squad": _short(3, fields.squad, "squad/bpb_5shot", metric="f1"),
    "jeopardy": _short(5, fields.jeopardy, "jeopardy/bpb_5shot"),
    # In the report, and no package is known to hold them: files of one's own (docs/evaluation.md).
    "mmlu_redux": _letters(5),
    "mmlu_pro": _letters(5),
    "mmmlu": _letters(5),
    "c_eval": _letters(5),
    "cmmlu": _letters(5),
    "agieval": _letters(0),
    "race_middle": _letters(5),
    "race_high": _letters(5),
    "c3": _letters(0),
    "ccpm": _letters(0),
    "clue_wsc": _letters(5),
    "bbh": _short(3, fields.asked),
    "cmrc": _short(1, fields.asked),
    "cruxeval_i": _short(2, fields.asked),
    "cruxeval_o": _short(2, fields.asked),
    "mgsm": Definition(
        "exact_match", 8, fields.asked, judge="number", max_tokens=320, stop=("\n\n", "Question:"), told=BOX
    ),
    "cmath": Definition(
        "exact_match", 3, fields.asked, judge="number", max_tokens=320, stop=("\n\n", "Question:"), told=BOX
    ),
}  # fmt: skip
