"""Reloads of a fleet: every worker prepares, then all commit in a new epoch, or nothing has happened."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from protos import admin_pb2 as pb
from router.front import epoch_attempt
from router.front.config_version import ConfigVersion
from router.front.version_files import VersionFiles
from tests.fake_engine import NEVER_AGREES, REFUSES, SLOW, token_at
from tests.router.front_fleet import Running, front_config, request_of, running_front
from tests.router.reloading import document_of, refusal, reload, tuning, with_level, with_own
from tests.router.test_front_streams import answer, detail_of, text_and_tokens

pytestmark = pytest.mark.asyncio

UNCHANGED = "the configuration in force stays as it was"


@asynccontextmanager
async def fleet_of_two(tmp_path: Path, **own: Any) -> AsyncIterator[Running]:
    """Agents a and b serve epoch 1."""
    at_start = front_config(tmp_path, 2, stateDir=str(tmp_path / "state"), **own)
    async with running_front(at_start) as running:
        await running.add_agent("a")
        await running.add_agent("b")
        await running.until_ready()
        yield running


class SlowDisk:
    """A version is written when `go_on` is set: until then it is between prepare and commit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.go_on = threading.Event(), threading.Event()
        write = VersionFiles.write

        def slowly(files: VersionFiles, version: ConfigVersion) -> None:
            self.is_reached.set()
            assert self.go_on.wait(20)
            write(files, version)

        monkeypatch.setattr(VersionFiles, "write", slowly)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.is_reached.wait, 20)


async def in_force(running: Running, version: int, epoch: int, tuned: int) -> None:
    """Front, disk and engine agree on what is in force, and the workers on what they are."""
    status = await running.status()
    assert (status.config_version, status.epoch, status.ready) == (version, epoch, True)
    assert [worker.state for worker in status.workers if worker.ep_rank >= 0] == ["serving", "serving"]
    listed = await running.admin.ListConfigVersions(pb.ListConfigVersionsRequest(), timeout=5)
    assert (listed.versions[0].version, listed.versions[0].in_force) == (version, True)
    files = running.front._history._files
    assert files is not None
    assert files.numbers() == sorted(one.version for one in listed.versions)
    await tuning(running, tuned)
    stats = running.front.state.stats
    assert stats is not None
    assert stats.epoch == epoch


async def test_a_reload_is_a_new_epoch_that_every_worker_has_prepared(tmp_path: Path) -> None:
    async with fleet_of_two(tmp_path) as running:
        stream = asyncio.create_task(answer(running, request_of([SLOW], max_tokens=20, ignore_eos=True)))
        response = await reload(running, await with_level(running, 2, microBatches=3))
        assert (response.version, response.applied) == (2, True)
        # At once: nobody has to wait for a step.
        await in_force(running, 2, 2, 203)
        for agent in running.agents:
            first, second = agent.epochs
            assert (first.ep_level, second.ep_level) == (1, 2)
            assert second.buffer_bytes != first.buffer_bytes
            assert (second.epoch, second.ep_rank, second.layers) == (2, first.ep_rank, first.layers)
            assert second.link.prefix != first.link.prefix
        assert not stream.done()
        assert text_and_tokens(await stream)[1] == [token_at([SLOW], index) for index in range(20)]


async def test_what_concerns_the_front_alone_needs_no_epoch(tmp_path: Path) -> None:
    async with fleet_of_two(tmp_path) as running:
        own = {"maxQueuedRequests": 5, "drainTimeoutSeconds": 3.0}
        assert (await reload(running, await with_own(running, **own))).applied
        await in_force(running, 2, 1, 101)
        assert [len(agent.epochs) for agent in running.agents] == [1, 1]


async def test_one_worker_that_refuses_leaves_all_as_it_was_and_is_named(tmp_path: Path) -> None:
    async with fleet_of_two(tmp_path) as running:
        before = await document_of(running)
        proposed = await with_level(running, 2, microBatches=3, maxQueuedRequests=5)
        running.agents[1].refuses = "the free memory of this machine is 12 bytes, but 13 bytes is needed"
        # More often than failures are forgiven: to refuse is no failure.
        for _ in range(4):
            error = await refusal(reload(running, proposed))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            for words in ("expert worker b refuses: the free memory", UNCHANGED):
                assert words in (error.details() or "")
            violations = detail_of(error, error_details_pb2.PreconditionFailure).violations
            assert [violation.subject for violation in violations] == ["expert worker b"]
        await asyncio.sleep(1.2)  # a heartbeat would restart a worker that has failed too often
        assert running.agents[1].restarts == []
        await in_force(running, 1, 1, 101)
        assert await document_of(running) == before
        assert running.front.config.max_queued_requests == 1000
        running.agents[1].refuses = ""
        response = await reload(running, proposed)
        assert response.applied
        status = await running.status()
        assert (status.config_version, status.ep_level) == (response.version, 2)
        assert status.epoch > 1


@pytest.mark.parametrize("event", ["loaded", "linked"])
async def test_a_worker_that_is_late_is_named_and_not_waited_for(tmp_path: Path, event: str) -> None:
    async with fleet_of_two(tmp_path) as running:
        running.agents[1].stops_before = event
        with pytest.MonkeyPatch.context() as impatient:
            impatient.setattr(epoch_attempt, "BESIDE_TIMEOUT_S", 2.0)  # ample for expert worker a
            impatient.setattr(epoch_attempt, "LINK_SLACK_S", 0.0)
            error = await refusal(reload(running, await with_own(running, microBatches=3)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        for words in ("expert worker b", "within 2 s", UNCHANGED):
            assert words in (error.details() or "")
        assert "expert worker a" not in (error.details() or "")
        await in_force(running, 1, 1, 101)
        running.agents[1].stops_before = ""
        assert (await reload(running, await with_own(running, microBatches=3))).applied
        await in_force(running, 2, 3, 103)


@pytest.mark.parametrize("how", ["its agent is gone", "it started anew", "it started anew and registered"])
async def test_a_worker_that_dies_between_prepare_and_commit_leaves_the_old_configuration_in_force(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of_two(tmp_path) as running:
        disk = SlowDisk(monkeypatch)
        before = await document_of(running)
        call = asyncio.create_task(reload(running, await with_level(running, 2, microBatches=3)))
        await disk.reached()
        victim = running.agents[1]
        assert victim.epochs[-1].epoch == 2
        if how == "its agent is gone":
            await victim.stop()
        else:
            victim.incarnation += 1
        if how.endswith("registered"):
            await victim.register()
        disk.go_on.set()
        error = await refusal(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        for words in ("expert worker b", UNCHANGED):
            assert words in (error.details() or "")
        status = await running.status()
        assert (status.config_version, status.ep_level) == (1, 1)
        assert await document_of(running) == before
        # The version that was written is taken back, and its number is not used again.
        listed = await running.admin.ListConfigVersions(pb.ListConfigVersionsRequest(), timeout=5)
        assert [one.version for one in listed.versions] == [1]
        assert [path.name for path in (tmp_path / "state").glob("config-*")] == ["config-0000000001.json"]
        if how == "its agent is gone":
            await running.add_agent("c")
        elif how == "it started anew":
            await victim.register()
        status = await running.until(lambda status: status.ready and status.epoch > 2)
        assert (status.config_version, status.ep_level) == (1, 1)
        await tuning(running, 101)
        # Nothing is left of it that would hinder the next.
        assert (await reload(running, await with_level(running, 2, microBatches=3))).version == 3
        await in_force(running, 3, status.epoch + 1, 203)


async def test_an_engine_that_dies_between_prepare_and_commit_leaves_the_old_configuration_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of_two(tmp_path) as running:
        disk = SlowDisk(monkeypatch)
        call = asyncio.create_task(reload(running, await with_own(running, microBatches=3)))
        await disk.reached()
        child = running.front.engine.child
        assert child is not None
        child.kill()
        await running.until(lambda status: not status.ready)
        disk.go_on.set()
        error = await refusal(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "engine ended" in (error.details() or "")
        status = await running.until_ready()
        await in_force(running, 1, status.epoch, 101)
        assert status.epoch > 2


@pytest.mark.parametrize("micro_batches", [REFUSES, NEVER_AGREES])
async def test_an_engine_that_does_not_agree_has_no_worker_prepare_anything(
    tmp_path: Path, micro_batches: int
) -> None:
    async with fleet_of_two(tmp_path) as running:
        running.front.tuning._timeout_s = 0.3
        await refusal(reload(running, await with_own(running, microBatches=micro_batches)))
        assert [len(agent.epochs) for agent in running.agents] == [1, 1]
        await in_force(running, 1, 1, 101)


async def test_a_full_disk_gives_the_prepared_epoch_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of_two(tmp_path) as running:

        def full(files: VersionFiles, version: ConfigVersion) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(VersionFiles, "write", full)
            error = await refusal(reload(running, await with_own(running, microBatches=3)))
        assert "No space left" in (error.details() or "")
        await in_force(running, 1, 1, 101)
        assert (await reload(running, await with_own(running, microBatches=3))).applied
        # The engine has let go of epoch 2: it would have ended where it had not.
        await in_force(running, 3, 3, 103)


async def test_a_dry_run_asks_every_worker_and_prepares_nothing(tmp_path: Path) -> None:
    async with fleet_of_two(tmp_path) as running:
        proposed = await with_level(running, 2)
        assert list((await reload(running, proposed, dry_run=True)).refusals) == []
        running.agents[0].refuses = "no"
        running.agents[1].refuses = "not now"
        response = await reload(running, proposed, dry_run=True)
        assert list(response.refusals) == [
            f"expert worker a refuses: no: {UNCHANGED}",
            f"expert worker b refuses: not now: {UNCHANGED}",
        ]
        for agent in running.agents:
            assert len(agent.epochs) == 1
            assert [check.ep_level for check in agent.checks] == [2, 2]
            assert agent.checks[0].buffer_bytes != agent.epochs[0].buffer_bytes
        await in_force(running, 1, 1, 101)
        await running.agents[1].stop()
        error = await refusal(reload(running, proposed, dry_run=True))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "expert worker b" in (error.details() or "")


async def test_while_an_epoch_is_being_prepared_a_reload_has_it_begun_again_with_the_new_needs(
    tmp_path: Path,
) -> None:
    async with running_front(front_config(tmp_path, 2)) as running:
        await running.add_agent("a")
        await running.add_agent("b", stops_before="loaded")
        await running.until(lambda status: {"loading"} & {worker.state for worker in status.workers} != set())
        running.agents[0].refuses = "no"
        error = await refusal(reload(running, await with_level(running, 2)))
        assert "expert worker a refuses: no" in (error.details() or "")
        running.agents[0].refuses = ""
        assert (await reload(running, await with_level(running, 2))).applied
        running.agents[1].stops_before = ""
        status = await running.until_ready()
        assert (status.config_version, status.ep_level) == (2, 2)
        assert [agent.epochs[-1].ep_level for agent in running.agents] == [2, 2]
        await tuning(running, 201)


async def test_a_worker_that_joins_meanwhile_waits_for_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of_two(tmp_path) as running:
        disk = SlowDisk(monkeypatch)
        call = asyncio.create_task(reload(running, await with_own(running, microBatches=3)))
        await disk.reached()
        spare = await running.add_agent("c")
        disk.go_on.set()
        assert (await call).version == 2
        status = await running.status()
        assert (status.epoch, status.workers[2].state) == (2, "registered")
        await running.agents[0].stop()
        status = await running.until(lambda status: status.ready and status.epoch > 2)
        assert spare.epochs
        await tuning(running, 103)


async def test_a_reload_that_waits_for_a_worker_does_not_hold_up_the_end_of_the_router(
    tmp_path: Path,
) -> None:
    async with fleet_of_two(tmp_path) as running:
        running.agents[1].stops_before = "linked"
        call = asyncio.create_task(reload(running, await with_own(running, microBatches=3)))
        async with asyncio.timeout(5):
            while len(running.agents[1].epochs) < 2:
                await asyncio.sleep(0.01)
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 8
    assert isinstance(await refusal(call), grpc.aio.AioRpcError)


async def test_rollback_and_sighup_ask_the_workers_too(tmp_path: Path) -> None:
    async with fleet_of_two(tmp_path) as running:
        await reload(running, await with_level(running, 2))
        await in_force(running, 2, 2, 201)
        response = await running.admin.RollbackConfig(pb.RollbackConfigRequest(version=1), timeout=10)
        assert response.version == 3
        await in_force(running, 3, 3, 101)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(await with_own(running, microBatches=2)))
        running.agents[0].refuses = "no"
        await running.front.reload.reread()
        await in_force(running, 3, 3, 101)
        running.agents[0].refuses = ""
        await running.front.reload.reread()
        status = await running.status()
        await in_force(running, 4, status.epoch, 102)
        assert status.epoch > 3
