"""reasoning-gym's tasks (extra ``[rl]``) under our protocol: ``get("gym/chain_sum", difficulty=2)``.

Questions are drawn here; answers are scored in the sandbox, for some of the library's scorers evaluate what a
model wrote. Difficulty d takes level d of each attribute of the task's curriculum, or the highest that the
task accepts.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

from dsv3.common.errors import Failure, UserError, nearest
from dsv3.evaluate.sandbox import Service
from dsv3.evaluate.tasks.base import (
    DIFFICULTIES,
    DRAWS,
    Example,
    Solution,
    Split,
    checked,
    content_id,
    seeded,
    split_of,
)
from dsv3.evaluate.verify import boxed, outside_thought

SIZE = 500  # items of a dataset, as the library has it: some make all of them at once
TRIES = 64  # draws from one dataset before the next
BLOCKS = 1 << 20  # datasets of that size, by seed
LEFT_OUT = {
    "composite",  # it mixes others, which are here themselves
    # The order of sets, another in every process, enters the item: a seed would not say which it is.
    "codeio", "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note",
}  # fmt: skip
# Their own answers score below 1 (or the library has none): to be reinforced, not imitated.
NO_SOLUTION = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}

SOURCE = """
import decimal
import functools
import numpy
from reasoning_gym import create_dataset
from reasoning_gym.factory import CURRICULA, create_curriculum

@functools.lru_cache(maxsize=128)
def dataset(name, difficulty, size, block):
    own = {"seed": block * size, "size": size}  # item i is drawn from seed + i
    if name in CURRICULA:
        curriculum = create_curriculum(name)
        for level in range(difficulty, 0, -1):
            for attribute, definition in curriculum.attributes.items():
                curriculum.set_attr_level(attribute, min(level, len(definition.levels)) - 1)
            try:
                return create_dataset(name, **{**vars(curriculum.generate_configuration()), **own})
            except AssertionError:
                pass  # some curricula lead out of what their task accepts
    return create_dataset(name, **own)

def item(name, difficulty, size, block, index):
    # Some tasks set the precision of decimals, or numpy's seed, for the whole process, and others obey.
    state = numpy.random.get_state()
    try:
        with decimal.localcontext(decimal.DefaultContext):
            return dataset(name, difficulty, size, block)[index]
    finally:
        numpy.random.set_state(state)
"""
# Those that evaluate an answer get a reader of literals in eval's place.
SCORING = """
import ast
from reasoning_gym.algorithmic import binary_matrix, number_sorting, spiral_matrix, string_insertion
from reasoning_gym.games import n_queens
for module in (binary_matrix, number_sorting, spiral_matrix, string_insertion, n_queens):
    module.eval = ast.literal_eval

def answer(request):
    where = [request[key] for key in ("name", "difficulty", "size", "block")]
    entry = item(*where, request["index"])
    if entry["question"] != request["question"]:
        return "another item"
    return float(dataset(*where).score_answer(request["given"], entry))
"""


@functools.cache
def _library() -> dict[str, Any]:
    """What SOURCE defines, here; raises :class:`UserError` where the library is absent."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("gym tasks need reasoning-gym, which is not installed; pip install 'dsv3[rl]'")
    space: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(SOURCE, space)  # the same lines run in the sandbox, so that both sides make the same items
    return space


@functools.cache
def _judge() -> Service:
    return Service(SOURCE + SCORING, seconds=30)  # the item is made again, which can take long


def names() -> list[str]:
    """``gym/NAME`` of every task the library has; none where it is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return []
    _library()
    from reasoning_gym.factory import DATASETS

    return [f"gym/{name}" for name in sorted(set(DATASETS) - LEFT_OUT)]


class GymTask:
    """One of reasoning-gym's tasks. Scores are the library's own, from 0 to 1, of the boxed answer."""

    def __init__(self, name: str, difficulty: int = 1, seed: int = 0):
        known = names() or (_library() and [])
        if f"gym/{name}" not in known:
            raise UserError(f"reasoning-gym has no task {name}{nearest(f'gym/{name}', known)}")
        if difficulty not in DIFFICULTIES:
            raise UserError(f"difficulty ({difficulty}) of gym/{name} must be from 1 to {DIFFICULTIES[-1]}")
        self.name, self.inner, self.difficulty, self.seed = f"gym/{name}", name, difficulty, seed

    def _item(self, where: dict[str, Any]) -> dict[str, Any]:
        """Question, answer and metadata of an item; the state of the process stays as it was."""
        found: dict[str, Any] = _library()["item"](self.inner, size=SIZE, **where)
        return found

    def sample(self, index: int, split: Split = "train") -> Example:
        checked(index, split)
        rng = seeded(self.name, self.seed, self.difficulty, index, split)
        where = {"difficulty": self.difficulty, "block": 0, "index": 0}
        for draw in range(DRAWS):
            if draw % TRIES == 0:
                where["block"] = rng.randrange(BLOCKS)
            where["index"] = rng.randrange(SIZE)
            item = self._item(where)
            identifier = content_id(self.name, item["question"])
            if split_of(identifier) == split:
                return Example(identifier, self.name, item["question"], str(item["answer"]), where)
        raise Failure(f"{self.name} at difficulty {self.difficulty} has no example for split {split}")

    def solve(self, example: Example) -> Solution | None:
        """The library's answer; its worked steps where it gives them (gsm_symbolic)."""
        if self.inner in NO_SOLUTION or example.answer == "None":
            return None
        steps = self._item(example.metadata)["metadata"].get("answer_cot")
        return Solution(str(steps or ""), example.answer)

    def verify(self, completion: str, example: Example) -> float:
        given = boxed(outside_thought(completion))
        if given is None:
            return 0.0
        request = {
            "name": self.inner, "size": SIZE, "given": given, "question": example.prompt, **example.metadata
        }  # fmt: skip
        score = _judge().ask(request)
        if isinstance(score, str):
            raise Failure(
                f"{self.name}: the sandbox made {score} of {example.metadata}: is it of another version?"
            )
        return float(score or 0.0)
