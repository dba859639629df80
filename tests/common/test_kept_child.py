"""Children that talk, die, stop and refuse, and the parent that keeps one of them running."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.channel import Fatal, Shutdown, by_name
from common.child_process import ChildProcess
from common.errors import CheckpointError
from common.kept_child import KeptChild, Kind
from common.progress_counter import ProgressCounter
from tests.common.talking_child import Hello, Say

MODULE = "tests.common.talking_child"
ACCEPTED = by_name(Hello, Fatal)
KIND = Kind("the child", MODULE, ACCEPTED, Hello)
DEADLINE_S = 20.0

pytestmark = pytest.mark.asyncio


@dataclass
class Parent:
    """What a kept child told."""

    kept: KeptChild
    messages: list[Any]
    ends: list[str]
    work: asyncio.Task[None]

    async def until(self, count: int) -> list[Any]:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.messages) < count:
                await asyncio.sleep(0.01)
        return self.messages


def parent_of(what: str, progress: ProgressCounter | None = None) -> Parent:
    messages: list[Any] = []
    ends: list[str] = []
    kept = KeptChild(KIND, lambda: Say(what), messages.append, ends.append, progress)
    return Parent(kept, messages, ends, asyncio.create_task(kept.run()))


async def test_a_child_that_is_killed_is_followed_by_another() -> None:
    parent = parent_of("hello")
    first = (await parent.until(1))[0]
    os.kill(first.pid, signal.SIGKILL)
    second = (await parent.until(2))[1]
    assert second.pid != first.pid
    assert parent.ends == ["the child ended with status -9"]
    await parent.kept.stop(Shutdown(), 5.0)
    await parent.work
    assert not psutil.pid_exists(second.pid)


async def test_a_child_that_cannot_start_is_not_started_again_and_its_sentence_arrives() -> None:
    parent = parent_of("fail")
    with pytest.raises(CheckpointError, match="the shard is damaged"):
        await asyncio.wait_for(parent.work, DEADLINE_S)
    assert parent.kept.child is None


async def test_a_child_that_ignores_its_farewell_is_killed_after_its_grace() -> None:
    parent = parent_of("stay")
    child = (await parent.until(1))[0]
    began = time.monotonic()
    await parent.kept.stop(Shutdown(), 0.3)
    await parent.work
    assert 0.3 <= time.monotonic() - began < 5
    assert not psutil.pid_exists(child.pid)


async def test_a_child_that_sends_what_is_no_message_is_replaced() -> None:
    parent = parent_of("babble")
    await parent.until(2)
    assert "no message" in parent.ends[0]
    await parent.kept.stop(Shutdown(), 5.0)
    await parent.work


async def test_a_parent_sees_progress_stops_and_processor_time_of_a_busy_child() -> None:
    progress = ProgressCounter.create()
    child = await ChildProcess.start(MODULE, ACCEPTED, progress)
    try:
        child.channel.send(Say("count"))
        await wait_for(lambda: progress.count > 3)
        assert not child.is_stopped
        await wait_for(lambda: child.cpu_time_ns > 0)
        os.kill(child.pid, signal.SIGSTOP)
        await wait_for(lambda: child.is_stopped)
        stood, used = progress.count, child.cpu_time_ns
        await asyncio.sleep(0.2)
        assert (progress.count, child.cpu_time_ns) == (stood, used)
    finally:
        child.kill()
        assert await child.wait() == -signal.SIGKILL
        progress.close()


async def test_signals_for_the_service_do_not_end_its_child_and_waits_do_not_spin(tmp_path: Path) -> None:
    child = await ChildProcess.start(MODULE, ACCEPTED)
    try:
        child.channel.send(Say("hello"))
        hello = await anext(aiter(child.channel))
        assert hello.omp_wait_policy == "passive"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child.pid, number)
        await asyncio.sleep(0.2)
        assert child.is_running
    finally:
        child.kill()
        await child.wait()


async def wait_for(claim: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not claim():
            await asyncio.sleep(0.02)
