"""reasoning-gym under our protocol; its scorers run in the sandbox."""

from __future__ import annotations

import decimal
import json
import subprocess
import sys

import numpy as np
import pytest

from dsv3.common.errors import UserError
from dsv3.evaluate.tasks import get, gym, names

pytest.importorskip("reasoning_gym")
FEW = ("gym/chain_sum", "gym/spiral_matrix", "gym/countdown", "gym/gsm_symbolic")


@pytest.mark.parametrize("name", FEW)
def test_its_own_answer_is_accepted_and_another_refused(name: str) -> None:
    task = get(name, 2)
    example, other = task.sample(0), task.sample(1)
    assert example == get(name, 2).sample(0) != other
    assert json.loads(json.dumps(example.row())) == example.row()
    solution = task.solve(example)
    assert solution is not None and task.verify(solution.reasoned(), example) == 1
    assert (name == "gym/gsm_symbolic") == bool(solution.reasoning)
    assert task.verify(f"\\boxed{{{other.answer}}}", example) < 1
    assert task.verify(example.answer, example) == 0  # not boxed


def test_splits_share_no_question() -> None:
    train = {get("gym/chain_sum", seed=1).sample(index).prompt for index in range(60)}
    held_out = {get("gym/chain_sum", seed=2).sample(index, "test").prompt for index in range(60)}
    assert not train & held_out and len(held_out) > 20


def test_an_answer_is_not_evaluated_here(tmp_path: object) -> None:
    """spiral_matrix's scorer evaluates lists: in the sandbox it reads literals only."""
    task = get("gym/spiral_matrix")
    example = task.sample(0)
    attack = f"[__import__('pathlib').Path('{tmp_path}/made').touch() or 1]"
    assert task.verify(f"\\boxed{{{attack}}}", example) < 1
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]
    numbers = example.answer.split()
    listed = f"[{', '.join(numbers)}]"
    assert task.verify(f"\\boxed{{{listed}}}", example) > 0.05  # the scorer's discount for a list
    computed = f"[{', '.join(numbers[:-1])}] + [{numbers[-1]}]"
    assert task.verify(f"\\boxed{{{computed}}}", example) < task.verify(f"\\boxed{{{listed}}}", example)


def test_another_process_draws_the_same() -> None:
    program = f"from dsv3.evaluate.tasks import get\nprint([get(name, 2).sample(5).id for name in {FEW}])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == f"{[get(name, 2).sample(5).id for name in FEW]}\n"


def test_the_state_of_the_process_is_left_alone() -> None:
    """decimal_arithmetic sets decimal's precision and pool_matrix numpy's seed; neither gets out."""
    before = get("gym/decimal_chain_sum", 4).sample(0)
    precision, state = decimal.getcontext().prec, np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    get("gym/decimal_arithmetic").sample(0)
    get("gym/pool_matrix").sample(0)
    assert decimal.getcontext().prec == precision
    assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]
    assert get("gym/decimal_chain_sum", 4).sample(0) == before


def test_names_and_mistakes() -> None:
    known = gym.names()
    assert len(known) == 100 and set(FEW) <= set(known) <= set(names())
    with pytest.raises(UserError, match=r"no task chain_sums \(did you mean gym/chain_sum\?\)"):
        get("gym/chain_sums")
    with pytest.raises(UserError, match="difficulty"):
        get("gym/chain_sum", 0)


def test_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    gym._library.cache_clear()
    with pytest.raises(UserError, match=r"dsv3\[rl\]"):
        get("gym/chain_sum")
