"""Runs ``triton_numbers.py`` and its like: through Triton's interpreter here, on the GPU where there is one.

Triton decides when it is imported whether it interprets: each gets a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

MINUTES = 15  # seconds of work, but on a machine with other work
pytestmark = pytest.mark.timeout(MINUTES * 60 + 60)
NUMBERS = [Path(__file__).with_name(name) for name in ("triton_numbers.py", "triton_mla_numbers.py")]


def run(interpret: str, marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", marked, *NUMBERS]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=root, timeout=MINUTES * 60
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def interpreted(marked: str) -> None:
    if Version(triton.__version__) < Version("3.9") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of this Triton does not know this numpy")
    run("1", marked)


def test_interpreted() -> None:
    interpreted("not slow")


@pytest.mark.slow
def test_interpreted_at_length() -> None:
    interpreted("slow")


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    run("0", "")
