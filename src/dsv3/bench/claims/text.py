"""The text of the training claims: code, prose and, written here, arithmetic (recipes/data-claims.yaml)."""

from __future__ import annotations

from pathlib import Path

from dsv3.common.errors import UserError
from dsv3.common.files import new_folder
from dsv3.config import recipe as recipes
from dsv3.config.data import DataRecipe
from dsv3.data.fetch import fetch
from dsv3.data.prepare import prepare
from dsv3.evaluate.tasks.draw import named, solved

RECIPE = Path("recipes/data-claims.yaml")
TASKS = ("sums", "products", "gcd", "bases", "fractions", "sequences")
LEVELS = (1, 2, 3, 4)
EXAMPLES, PAGE = 1500, 20  # of a task and level, and of those on a page


def prepared() -> Path:
    """The folder of token shards, made first where it is not there."""
    if not RECIPE.is_file():
        raise UserError(f"{RECIPE} is not here: run this in the repository's folder")
    recipe = recipes.load(DataRecipe, RECIPE)
    if not (Path(recipe.out) / "manifest.json").is_file():
        for source in recipe.sources:
            if source.manifest is not None and source.folder is not None:
                fetch(source.manifest, source.folder)
            for folder in map(Path, source.paths or ()):
                if not folder.is_dir():
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    write_exercises(folder)
        prepare(recipe)
    return Path(recipe.out)


def write_exercises(folder: Path, examples: int = EXAMPLES) -> None:
    """Pages of exercises with their solutions; no exercise stands on two pages."""
    with new_folder(folder) as made:
        for name in TASKS:
            for level in LEVELS:
                rows = solved(named(f"{name}:{level}"), examples)
                said = [f"{row['prompt']}\n{spoken(row['completion'])}\n" for row in rows]
                for first in range(0, len(said), PAGE):
                    page = made / f"{name}-{level}-{first:04d}.txt"
                    page.write_text("\n".join(said[first : first + PAGE]), encoding="utf-8")


def spoken(completion: str) -> str:
    """A solution without the marks of thinking: steps, then the answer."""
    return completion.replace("<think>\n", "").replace("\n</think>\n", "")
