"""Code tasks (report 5.2: test cases give the reward) out of functions whose docstrings show examples.

The functions are read, not imported, from packages that happen to be installed and from the standard library.
The prompt is signature and docstring with the first half of the examples; the other half is held out, and the
score is the share of it that the written function reproduces in the sandbox. What the examples ought to print
never enters the sandbox: the outputs come out and are compared here. Examples that compare for themselves
(``>>> f(1) == 2``) are not used, for an object that equals everything would pass them.

A function is kept only if its own code, alone with the standard library, reproduces every example.
"""

from __future__ import annotations

import ast
import doctest
import functools
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.common.errors import Failure, UserError
from dsv3.evaluate.sandbox import MIB, Sandbox
from dsv3.evaluate.tasks.base import (
    DIFFICULTIES,
    Example,
    Solution,
    Split,
    checked,
    content_id,
    seeded,
    split_of,
)
from dsv3.evaluate.verify import outside_thought

PACKAGES = (
    "algorithms", "boltons", "more_itertools", "toolz", "networkx",
    "bisect", "calendar", "difflib", "heapq", "statistics", "textwrap",
)  # fmt: skip
LINES = (4, 8, 14, 25, 60)  # of the function's own code, at most, by difficulty
GOLD_SECONDS = 20.0  # for two hundred functions at a time

# Runs each case in a namespace of its own and prints, a line a case, what its examples printed.
RUNNER = """
import __future__, contextlib, io, json, os, sys
real = os.fdopen(os.dup(1), "w")

def outputs(solution, sources):
    space = {"__name__": "solution"}
    said = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            flag = __future__.annotations.compiler_flag
            exec(compile(solution, "solution.py", "exec", flag), space)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    for source in sources:
        heard = io.StringIO()
        try:
            with contextlib.redirect_stdout(heard):
                exec(compile(source, "example", "single"), space)
            said.append(heard.getvalue())
        except BaseException as error:
            said.append(None)
    return said

for solution, sources in CASES:
    print(json.dumps(outputs(solution, sources)), file=real, flush=True)
"""


@dataclass(frozen=True)
class Case:
    """A function to be written. ``imports``: lines of the standard library it stands under."""

    package: str
    name: str
    imports: str
    header: str
    gold: str
    docstring: str
    examples: tuple[doctest.Example, ...]
    hidden: tuple[int, ...]

    def shown(self) -> str:
        """Imports, signature and the docstring without the hidden examples."""
        lines = self.docstring.split("\n")
        for at in reversed(self.hidden):
            example = self.examples[at]
            size = example.source.count("\n") + example.want.count("\n")
            del lines[example.lineno : example.lineno + size]
        text = re.sub(r"\n\s*\n(\s*\n)+", "\n\n", "\n".join(lines)).strip()
        body = ("    " + line if line.strip() else "" for line in f'"""{text}\n"""'.split("\n"))
        return self.imports + self.header + "\n" + "\n".join(body)


class Doctests:
    """Functions to write, with up to 4, 8, 14, 25 or 60 lines of code by difficulty."""

    name = "doctests"

    def __init__(self, difficulty: int = 1, seed: int = 0, sandbox: Sandbox | None = None):
        if difficulty not in DIFFICULTIES:
            raise UserError(f"difficulty ({difficulty}) of doctests must be from 1 to {DIFFICULTIES[-1]}")
        self.difficulty, self.seed = difficulty, seed
        self.sandbox = sandbox or Sandbox()

    def sample(self, index: int, split: Split = "train") -> Example:
        """The functions of a split in a new order each time round; there are as many as are installed."""
        checked(index, split)
        cases = [
            (identifier, case)
            for identifier, case in kept().items()
            if split_of(identifier) == split and case.gold.count("\n") < LINES[self.difficulty - 1]
        ]
        if not cases:
            raise Failure(f"no function for split {split} at difficulty {self.difficulty}; install dsv3[rl]")
        lap, place = divmod(index, len(cases))
        order = list(range(len(cases)))
        seeded(self.name, self.seed, self.difficulty, lap, split).shuffle(order)
        identifier, case = cases[order[place]]
        prompt = f"Write this Python function.\n\n```python\n{case.shown()}\n```"
        metadata = {
            "package": case.package, "imports": case.imports,
            "sources": [example.source for example in case.examples], "hidden": list(case.hidden),
            "wants": [example.want for example in case.examples],
            "options": [sum(k for k, on in example.options.items() if on) for example in case.examples],
        }  # fmt: skip
        return Example(identifier, self.name, prompt, case.gold, metadata)

    def solve(self, example: Example) -> Solution:
        """The function as its authors wrote it."""
        return Solution("", example.answer, f"```python\n{example.answer}\n```")

    def verify(self, completion: str, example: Example) -> float:
        """Share of the hidden examples whose output is right."""
        code = code_of(outside_thought(completion))
        facts = example.metadata
        if code is None:
            return 0.0
        said = _run([(facts["imports"] + code, facts["sources"])], self.sandbox)
        outputs = said[0] if said else None
        return sum(_same(facts, outputs, at) for at in facts["hidden"]) / len(facts["hidden"])


def code_of(text: str) -> str | None:
    """The last fenced block of a response, or all of a response that is bare code."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", text, re.DOTALL)
    if blocks:
        return str(blocks[-1])
    return text if re.match(r"\s*(?:def|from|import|@)\s", text) else None


def _same(facts: dict[str, Any], outputs: Any, at: int) -> bool:
    """Whether output ``at`` is what the example shows, by doctest's own rules."""
    got = outputs[at] if isinstance(outputs, list) and at < len(outputs) else None
    want, options = facts["wants"][at], facts["options"][at]
    return isinstance(got, str) and doctest.OutputChecker().check_output(want, got, options)


def _run(cases: list[tuple[str, list[str]]], sandbox: Sandbox) -> list[Any]:
    """Outputs of each case's examples; fewer cases than asked where the program was ended."""
    outcome = sandbox.run(f"CASES = {cases!r}\n{RUNNER}")
    said = []
    for line in outcome.stdout.splitlines():
        try:
            said.append(json.loads(line))
        except ValueError:
            break
    return said[: len(cases)]


@functools.cache
def kept(packages: tuple[str, ...] = PACKAGES) -> dict[str, Case]:
    """Functions whose own code reproduces their examples, by content; some seconds, once a process."""
    found = [case for package in packages for case in read(package)]
    good: dict[str, Case] = {}
    sandbox = Sandbox(seconds=GOLD_SECONDS, output=8 * MIB)
    while found:
        batch = found[:200]
        said = _run([(c.imports + c.gold, [e.source for e in c.examples]) for c in batch], sandbox)
        for case, outputs in zip(batch, said):
            facts = {
                "wants": [e.want for e in case.examples],
                "options": [sum(k for k, on in e.options.items() if on) for e in case.examples],
            }
            tested = [at for at, example in enumerate(case.examples) if example.want]
            if all(_same(facts, outputs, at) for at in tested):
                good.setdefault(content_id("doctests", [case.header, case.gold]), case)
        found = found[max(1, min(len(said) + (len(said) < len(batch)), len(batch))) :]  # past one that hangs
    return good


def read(package: str) -> Iterator[Case]:
    """Functions with examples in a package's or module's files; nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    for path in files:
        if "test" in path.name:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        imports = [node for node in tree.body if _standard(node)]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                case = _case(package, node, imports)
                if case is not None:
                    yield case


def _standard(node: ast.stmt) -> bool:
    """Whether a statement imports from the standard library alone."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module != "__future__":
        modules = [node.module or ""]
    else:
        return False
    return all(module.split(".")[0] in sys.stdlib_module_names for module in modules)


def _case(package: str, node: ast.FunctionDef, imports: list[ast.stmt]) -> Case | None:
    docstring = ast.get_docstring(node)
    if not docstring or '"""' in docstring or len(node.body) < 2:
        return None
    # Imports of the function itself would fail where it stands alone.
    docstring = re.sub(rf"^[ \t]*>>> (?:from|import) {package}\b.*\n", "", docstring, flags=re.MULTILINE)
    try:
        examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError:
        return None
    tested = [at for at, example in enumerate(examples) if _tests(example)]
    if len(tested) < 2 or any(example.exc_msg for example in examples):
        return None
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
    gold = ast.unparse(ast.fix_missing_locations(bare))
    used = {part.id for part in ast.walk(bare) if isinstance(part, ast.Name)}
    lines = [_needed(line, used) for line in imports]
    header = gold.split("\n")[0]
    if not header.endswith(":"):
        return None
    hidden = tuple(tested[-(len(tested) // 2) :])
    seen = {example.want for at, example in enumerate(examples) if at not in hidden}
    if all(examples[at].want in seen for at in hidden):
        return None  # returning what is shown would do
    return Case(package, node.name, "".join(lines), header, gold, docstring, tuple(examples), hidden)


def _needed(line: ast.stmt, used: set[str]) -> str:
    """An import without the names that are not used; empty where none is."""
    assert isinstance(line, (ast.Import, ast.ImportFrom))
    names = [alias for alias in line.names if (alias.asname or alias.name).split(".")[0] in used]
    if not names:
        return ""
    if isinstance(line, ast.Import):
        return ast.unparse(ast.Import(names)) + "\n"
    return ast.unparse(ast.ImportFrom(line.module, names, 0)) + "\n"


def _tests(example: doctest.Example) -> bool:
    """Whether an example shows an output that only a right result prints."""
    if not example.want.strip():
        return False
    try:
        body = ast.parse(example.source).body
    except SyntaxError:
        return False
    tests = (ast.Compare, ast.BoolOp)
    return not any(isinstance(part, tests) for statement in body for part in ast.walk(statement))
