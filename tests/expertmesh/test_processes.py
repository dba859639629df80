"""Services as child processes: they are told to end, made to end, and never outlive who started them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from expertmesh.processes import Processes

IDLE = "tests.expertmesh.idle_service"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_service_outlives_a_parent_that_is_killed(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.expertmesh.idle_parent"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        services = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(services) == 2
        parent.send_signal(how)
    _, alive = psutil.wait_procs(services, timeout=10)
    assert alive == []


@pytest.mark.asyncio
async def test_a_service_that_ignores_sigterm_is_killed_after_its_grace() -> None:
    async with Processes(lambda _name, _line: None) as processes:
        stubborn = await processes.start("stubborn", IDLE, "stubborn")
        assert await stubborn.read_line() == "listening here=1"
        began = time.monotonic()
        await processes.stop(grace_s=0.3)
        assert 0.3 <= time.monotonic() - began < 5
    assert stubborn.why().startswith("stubborn was ended by SIGKILL")


@pytest.mark.asyncio
async def test_a_service_that_fails_is_quoted_with_its_last_words() -> None:
    lines: list[tuple[str, str]] = []
    async with Processes(lambda name, line: lines.append((name, line))) as processes:
        service = await processes.start("router", IDLE, "fail")
        assert await service.read_line() is None
        assert await service.wait() == 2
    assert service.why() == "router exited with 2: something was wrong with the input"
    assert lines == [("router", "something was wrong with the input")]


@pytest.mark.asyncio
async def test_services_get_the_environment_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_TEST_INHERITED", "1")
    async with Processes(lambda _name, _line: None, {"EXPERTMESH_TEST_GIVEN": "2"}) as processes:
        service = await processes.start("one", IDLE)
        await service.read_line()
        environment = psutil.Process(service.pid).environ()
    assert (environment["EXPERTMESH_TEST_INHERITED"], environment["EXPERTMESH_TEST_GIVEN"]) == ("1", "2")
