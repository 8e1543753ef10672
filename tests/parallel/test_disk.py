"""A disk that is full on one rank: all ranks stop with the same line, and the checkpoint before it stays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.run import verify
from dsv3.cli import main as command
from dsv3.common.errors import Failure, UserError
from tests.parallel.layouts import tree
from tests.parallel.ranks import run_ranks
from tests.train.conftest import prepare_words


def train(run: dict[str, Any]) -> list[Any]:
    """In a rank: rank 1 may write no file above 20 KB after the first checkpoint; how the run ended."""
    import resource

    from dsv3.config import recipe as recipes
    from dsv3.config.train import PretrainRecipe
    from dsv3.train.callbacks.checkpoints import Checkpoints
    from dsv3.train.pretrain import pretrain

    plain = Checkpoints.save

    def save(self: Checkpoints, trainer: Any) -> None:
        if trainer.state.step == 4 and os.environ["RANK"] == "1":
            self.finish(trainer)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        plain(self, trainer)

    Checkpoints.save = save  # type: ignore[method-assign]
    try:
        pretrain(recipes.validate(PretrainRecipe, run))
    except Failure as error:
        return [str(error), error.exit_code, error.shared]
    return []


@pytest.mark.slow
def test_a_full_disk_in_a_sharded_save(tmp_path: Path) -> None:
    data, out = prepare_words(tmp_path), tmp_path / "run"
    changes = {"checkpoint": {"every": 2, "keep": 10}, "parallel": {"expert": 2}}
    first, second = run_ranks(2, "tests.parallel.test_disk:train", tree(str(data), str(out), 8, changes))
    assert first == second
    line, code, shared = first
    assert line.startswith(f"rank 1: cannot write {out}/checkpoints/step-000004: ")
    assert "free some space" in line and "\n" not in line and code == 1 and shared
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-000002"]
    verify(out / "checkpoints/step-000002")


class Left(Exception):
    """In the place of os._exit."""


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("error", [UserError("bad"), Failure("mine")])
def test_one_rank_says_what_all_know(
    rank: str, error: UserError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(command, "run", fail)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match=str(error.exit_code)):
        command.main()
    said = capsys.readouterr().err
    assert said == ("" if rank == "1" and error.shared else f"dsv3: {error}\n")
