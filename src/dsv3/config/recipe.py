"""Typed recipes: YAML read into a pydantic model, with dotted overrides from the command line.

A recipe is a pydantic model whose fields carry a ``description`` (meaning and unit). Unknown keys are
refused with the nearest known one; every refusal is a :class:`UserError` naming the full dotted key.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticUndefined

from dsv3.common.errors import UserError, nearest


class Recipe(BaseModel):
    """Base of every typed section: frozen, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # Keys that stand for others (``preset``), with their description; :meth:`expand` replaces them.
    shorthand: ClassVar[dict[str, str]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """``--total_tokens`` without a value is ``true``, and Python would take that for 1."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = cls.model_fields[info.field_name].annotation
            if bool not in (kinds, *get_args(kinds)) and {int, float} & {kinds, *get_args(kinds)}:
                raise ValueError("needs a number")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _keep_a_sections_defaults(cls, value: Any, info: ValidationInfo) -> Any:
        """What a section given in part leaves out is this recipe's default, not its class's."""
        default = cls.model_fields[info.field_name].default if info.field_name else None
        if isinstance(default, Recipe) and isinstance(value, Mapping):
            return {**default.model_dump(exclude_unset=True), **value}
        return value

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Replace shorthand keys by the keys they stand for; called before unknown keys are refused."""
        return tree


R = TypeVar("R", bound=Recipe)

# Whose recipes are whose, to tell a recipe that was given to another verb; looked at for nothing else.
VERBS = {
    "data prepare": "data:DataRecipe",
    "data fetch": "data:ManifestConfig",
    "pretrain": "train:PretrainRecipe",
    "extend": "extend:ExtendRecipe",
    "sft": "sft:SFTRecipe",
    "distill": "distill:DistillRecipe",
    "reward": "reward:RewardRecipe",
    "grpo": "grpo:GRPORecipe",
    "bench end-to-end": "end_to_end:EndToEndRecipe",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a float: ``1e-3`` is a number (PyYAML's own rule wants ``1.0e-3``)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """Read one command-line value as YAML: numbers, booleans, null, [lists] and {maps}; else a string."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn ``["--optimizer.lr", "1e-3", "--model.preset=tiny", "--compile"]`` into dotted keys and values.

    A key without a value is ``true``. Raises :class:`UserError` for anything that is not ``--key [value]``.
    """
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f"unexpected argument {word!r}: overrides look like --section.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        found[key.replace("-", "_")] = parse_value(value)
    return found


def _section(cls: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The recipe class behind a field, if it is a section or a list of them (``X | None``, ``list[X]``)."""
    annotation = cls.model_fields[field].annotation
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def keys(
    cls: type[BaseModel], prefix: str = "", section: BaseModel | None = None
) -> dict[str, tuple[str, str, Any]]:
    """Every dotted key of a recipe class: ``{key: (type, description, default)}``; no default is ``...``.

    ``section``: of this class, with the defaults that a recipe has for it.
    """
    found: dict[str, tuple[str, str, Any]] = {}
    if issubclass(cls, Recipe):
        found.update({prefix + name: ("str", text, None) for name, text in cls.shorthand.items()})
    for name, info in cls.model_fields.items():
        default = info.get_default(call_default_factory=True) if not info.is_required() else ...
        if default is PydanticUndefined:
            default = ...
        if section is not None:
            default = getattr(section, name)
        below = _section(cls, name)
        if below is not None:
            found.update(keys(below, f"{prefix}{name}.", default if isinstance(default, BaseModel) else None))
            continue
        kind = getattr(info.annotation, "__name__", None) or str(info.annotation)
        if get_args(info.annotation):
            kind = str(info.annotation).replace("typing.", "")
        found[prefix + name] = (kind, info.description or "", default)
    return found


def merge(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``section.key`` of plain nested data; raises :class:`UserError` where the section is a value."""
    *sections, last = dotted.split(".")
    for depth, name in enumerate(sections):
        below = tree.setdefault(name, {})
        if below is None:
            below = tree[name] = {}
        if not isinstance(below, dict):
            raise UserError(f"--{dotted}: {'.'.join(sections[: depth + 1])} is a value, not a section")
        tree = below
    tree[last] = value


def _refuse_unknown(cls: type[BaseModel], tree: Any, prefix: str = "") -> None:
    if isinstance(tree, list):  # of sections
        for number, entry in enumerate(tree):
            _refuse_unknown(cls, entry, f"{prefix}{number}.")
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key not in cls.model_fields:
            whole = list(keys(cls, prefix)) + [prefix + name for name in cls.model_fields]
            hint = nearest(f"{prefix}{key}", whole) or f"; known here: {', '.join(cls.model_fields)}"
            raise UserError(f"unknown key {prefix}{key}{hint}")
        section = _section(cls, key)
        if section is not None:
            _refuse_unknown(section, value, f"{prefix}{key}.")


def _expand(cls: type[BaseModel], tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if issubclass(cls, Recipe):
        tree = cls.expand(tree)
    expanded = {}
    for key, value in tree.items():
        section = _section(cls, key) if key in cls.model_fields else None
        expanded[key] = value if section is None else _expand(section, value)
    return expanded


def validate(cls: type[R], tree: dict[str, Any]) -> R:
    """Build a recipe from plain data; raises :class:`UserError` naming the first bad key and its value."""
    tree = _expand(cls, tree)
    _refuse_unknown(cls, tree)
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or cls.__name__
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise UserError(f"{where} is required: set it in the recipe or with --{where} VALUE") from None
        if first["type"] in ("list_type", "tuple_type"):
            message = f"must be a list, e.g. [{first.get('input')}]"
        if first["type"] == "value_error" and isinstance(first.get("input"), dict):
            raise UserError(message) from None  # a validator over a whole section names its own fields
        raise UserError(f"{where} ({first.get('input')!r}): {message}") from None


def load(cls: type[R], path: str | Path, overrides: list[str] | None = None) -> R:
    """Read a YAML recipe, apply dotted overrides, validate. Raises :class:`UserError` on any mistake."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a YAML file" if path.is_dir() else "does not exist"
        raise UserError(f"recipe {path} {what}; the ones that ship are in recipes/")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{path}:{line + 1}" if line is not None else str(path)
        raise UserError(f"{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of keys, not a {type(tree).__name__}")
    if not _knows(cls, tree) and (verb := _verb_of(tree)):
        raise UserError(f"{path} is a recipe of another verb: dsv3 {verb} {path}")
    for key, value in parse_overrides(overrides or []).items():
        merge(tree, key, value)
    return validate(cls, tree)


def _knows(cls: type[BaseModel], tree: dict[str, Any]) -> bool:
    """Whether a recipe class knows every key of ``tree``; one that takes any is known by what it requires."""
    shorthand = getattr(cls, "shorthand", {})
    if "..." in shorthand:
        return all(key in tree for key, info in cls.model_fields.items() if info.is_required())
    for key, value in tree.items():
        if key not in cls.model_fields and key not in shorthand:
            return False
        section = _section(cls, key) if key in cls.model_fields else None
        if section is not None and isinstance(value, dict) and not _knows(section, value):
            return False
    return True


def _verb_of(tree: dict[str, Any]) -> str | None:
    """The one verb whose recipes know every key of ``tree``, if there is one."""
    known = []
    for verb, place in VERBS.items():
        module, _, name = place.partition(":")
        if _knows(getattr(importlib.import_module(f"dsv3.config.{module}"), name), tree):
            known.append(verb)
    return known[0] if len(known) == 1 else None


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two dumped recipes differ: the dotted key of each value with what it was and what it is."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [(key, before, now)]
    names = dict.fromkeys([*now, *before])
    return [
        found
        for name in names
        for found in differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    ]


def dump(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, every key written out."""
    plain = json.loads(recipe.model_dump_json())
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
