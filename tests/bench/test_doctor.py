"""The doctor's findings: true of this machine, and with the reason where something is off."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import psutil
import pytest

from dsv3.bench.doctor import examine, report
from dsv3.common.progress import human


def test_what_is_on_and_why_others_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.bench.doctor.find_spec", lambda name: None if name == "wandb" else object())
    monkeypatch.setenv("DSV3_NATIVE", "0")
    monkeypatch.setenv("CXX", "no-such-compiler")
    level = logging.getLogger("dsv3").level
    found = examine()
    paths = {one["name"]: one for one in found["paths"]}
    for name in ("decode", "quantise"):
        assert paths[f"CPU kernels: {name}"] == {
            "name": f"CPU kernels: {name}", "on": False, "detail": "plain PyTorch (DSV3_NATIVE=0)"
        }  # fmt: skip
    assert not paths["C++ compiler"]["on"] and "no-such-compiler" in paths["C++ compiler"]["detail"]
    assert "FP8 grouped linear" in paths and "reference" in paths["MLA decode"]["detail"]
    libraries = {one["name"]: one for one in found["libraries"]}
    assert not libraries["wandb"]["on"] and "dsv3[track]" in libraries["wandb"]["detail"]
    assert libraries["pyarrow"]["on"] and found["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert logging.getLogger("dsv3").level == level
    text = report(found, human)
    assert "--  wandb" in text and "no-such-compiler" in text


@pytest.mark.slow
def test_as_json() -> None:
    done = subprocess.run([sys.executable, "-m", "dsv3", "doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"machine", "paths", "libraries"}
