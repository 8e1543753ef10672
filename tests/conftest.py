"""What every test shares: one thread (test processes run side by side), a fixed seed, the same examples."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Before torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "dsv3",
    deadline=None,
    max_examples=25,
    derandomize=True,  # the same examples on every run: a red test stays red
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dsv3")


# A shell starts what runs in its background with Ctrl-C ignored, and the processes that tests interrupt would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what divides its work among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
