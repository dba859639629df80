"""What all tests share: one thread per process, a fixed seed, and no process left behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before anything imports torch, and inherited by every process a test starts. Spinning waits would make a few
# processes on a few cores several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import psutil
import pytest

SHUTDOWN_S = 10.0
# Python's own servant of multiprocessing; it ends with this process.
NOT_OURS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Random tensors are the same in every run, in any order of tests."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_process_left() -> Iterator[None]:
    """Fail the session when a process that a test started outlives it."""
    yield
    ours = [one for one in psutil.Process().children(recursive=True) if not _is_servant(one)]
    _, alive = psutil.wait_procs(ours, timeout=SHUTDOWN_S)
    for one in alive:
        one.kill()
    if alive:
        raise AssertionError(f"processes outlived the tests that started them: {alive}")


def _is_servant(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return True
    return any(name in line for name in NOT_OURS)
