"""These tests run by `make test-npu`: with torch_npu, on a fake CANN. Elsewhere they are not collected."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

STATUS = pytest.StashKey[int]()

collect_ignore_glob = ["test_*.py"]
if "FAKE_CANN" in os.environ:
    import torch_npu  # noqa: F401 - makes "npu" a device

    collect_ignore_glob = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked, so that plain `pytest` leaves it out."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.npu)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process here, as the services do: torch_npu's threads may call what was unloaded already."""
    if "FAKE_CANN" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash.get(STATUS, 1))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the status for the end."""
    session.config.stash[STATUS] = int(exitstatus)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which the fake CANN writes what is called."""
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("FAKE_CANN_LOG", str(log))
    return log
