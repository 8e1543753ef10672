"""What MkDocs does not do by itself, for ``make docs``."""

import re
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).parent.parent / "src"
_ROOM = re.compile(r"^\[\[modules of (?P<room>[\w.]+)\]\]$", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(?=<code>)")


def _modules(match: re.Match[str]) -> str:
    room = _SOURCE / match["room"].replace(".", "/")
    paths = sorted(path for path in room.rglob("*.py") if path.name != "__init__.py")
    names = [".".join(path.relative_to(_SOURCE).with_suffix("").parts) for path in paths]
    return "\n\n".join(f"::: {name}\n    options: {{heading_level: 2}}" for name in names)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``[[modules of dsv3.model]]`` stands for every module of a room: the reference is always whole."""
    return _ROOM.sub(_modules, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things in reStructuredText (:func:`name`); the site shows the name alone."""
    return _ROLE.sub("", html)
