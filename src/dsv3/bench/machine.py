"""What a figure was measured on, with which code, and when."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
from typing import Any

import torch


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions, for the ``machine`` key of every benchmark's JSON."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def today() -> str:
    """The date, as 2026-11-22."""
    return datetime.date.today().isoformat()


def commit() -> str:
    """The working tree's commit, and after a + a hash of what is changed in its ``src``; or ``unknown``."""
    head = _git("rev-parse", "--short", "HEAD").strip()
    if not head:
        return "unknown"
    changes = _git("diff", "HEAD", "--", "src")
    return head + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:6]}" if changes else "")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
