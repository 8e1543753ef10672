"""The chat page: plain HTML, CSS and JavaScript beside this file, nothing to build or fetch elsewhere.

A server hands out :func:`files` at its root and sends :data:`HEADERS` with each of them.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
HEADERS = {
    # Scripts, styles and requests of this origin only: text that a model wrote can neither run nor call out.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def files() -> dict[str, tuple[str, bytes]]:
    """Path below the root to (media type, content); the page itself is ``/``, everything is UTF-8."""
    found = {}
    for file in sorted(FOLDER.iterdir()):
        if file.suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            found[path] = (f"{_TYPES[file.suffix]}; charset=utf-8", file.read_bytes())
    return found
