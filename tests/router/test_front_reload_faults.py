"""Engines that refuse, die or say nothing, callers who leave, signals and restarts: never half a reload."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from pathlib import Path

import grpc
import pytest

from protos import admin_pb2 as pb
from tests.fake_engine import AGREES_AND_DIES, DIES_WHEN_ASKED, NEVER_AGREES, REFUSES
from tests.router.front_fleet import front_config, running_front
from tests.router.reloading import document_of, refusal, reload, tuning, with_level, with_own

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("micro_batches", "code", "words"),
    [
        (REFUSES, grpc.StatusCode.FAILED_PRECONDITION, "8 parts are too many"),
        (NEVER_AGREES, grpc.StatusCode.UNAVAILABLE, "did not answer within 0.3 s"),
        (DIES_WHEN_ASKED, grpc.StatusCode.UNAVAILABLE, "ended before it had agreed"),
    ],
)
async def test_an_engine_that_does_not_agree_leaves_everything_as_it_was(
    tmp_path: Path, micro_batches: int, code: grpc.StatusCode, words: str
) -> None:
    async with running_front(front_config(tmp_path, 0, stateDir=str(tmp_path / "state"))) as running:
        await running.until_ready()
        running.front.tuning._timeout_s = 0.3
        before = await document_of(running)
        proposed = await with_own(running, microBatches=micro_batches, maxQueuedRequests=5)
        error = await refusal(reload(running, proposed))
        assert error.code() is code
        assert words in (error.details() or "")
        await running.until_ready()
        await tuning(running, 101)
        assert await document_of(running) == before
        assert running.front.config.max_queued_requests == 1000
        assert len(list((tmp_path / "state").glob("config-*.json"))) == 1
        response = await reload(running, await with_own(running, microBatches=2))
        assert response.applied
        await tuning(running, 102)


async def test_an_engine_that_dies_after_it_agreed_comes_back_with_all_of_the_new_configuration(
    tmp_path: Path,
) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        response = await reload(running, await with_level(running, 2, microBatches=AGREES_AND_DIES))
        assert response.applied
        await running.until(lambda status: status.engine_state == "restarting")
        await running.until_ready()
        await tuning(running, 200 + AGREES_AND_DIES)


async def test_an_engine_that_is_started_again_gets_the_configuration_in_force(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        await reload(running, await with_level(running, 2, microBatches=4))
        child = running.front.engine.child
        assert child is not None
        child.kill()
        await running.until(lambda status: status.engine_state == "restarting")
        await running.until_ready()
        await tuning(running, 204)


async def test_a_reload_that_waits_for_the_engine_does_not_hold_up_the_end_of_the_router(
    tmp_path: Path,
) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        proposed = await with_own(running, microBatches=NEVER_AGREES)
        call = asyncio.create_task(reload(running, proposed))
        while running.front.tuning._answer is None:
            await asyncio.sleep(0.01)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert isinstance(await refusal(call), grpc.aio.AioRpcError)


async def test_a_caller_who_leaves_does_not_leave_half_a_change(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        for number in range(2, 5):
            document = json.dumps(await with_own(running, microBatches=number))
            call = running.admin.ReloadConfig(pb.ReloadConfigRequest(config_json=document))
            while running.front.reload._running == set():
                await asyncio.sleep(0)
            call.cancel()
            await tuning(running, 100 + number)
            assert (await running.status()).config_version == number


async def test_sighup_reads_the_file_again_and_an_error_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "config.json"
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, running.front.reread_file)

        async def logged(words: str) -> None:
            async with asyncio.timeout(5):
                while words not in caplog.text:
                    await asyncio.sleep(0.01)

        with caplog.at_level(logging.INFO):
            document = await with_own(running, microBatches=3)
            for text, words in (
                (json.dumps(document)[:-1], "is no JSON"),
                (
                    json.dumps(document | {"ServerConfig": {"port": 0, "managementPort": 9}}),
                    "needs another start",
                ),
                (json.dumps(await with_own(running, microBatches=REFUSES)), "8 parts are too many"),
            ):
                file.write_text(text)
                os.kill(os.getpid(), signal.SIGHUP)
                await logged(words)
                assert (await running.status()).config_version == 1
            file.write_text(json.dumps(document))
            os.kill(os.getpid(), signal.SIGHUP)
            status = await running.until(lambda status: status.config_version == 2)
            assert status.warnings == []
            await tuning(running, 103)
            os.kill(os.getpid(), signal.SIGHUP)
            await logged("holds what is in force already: version 2")
        listed = await running.admin.ListConfigVersions(pb.ListConfigVersionsRequest(), timeout=5)
        assert (listed.versions[0].origin, listed.versions[0].author) == ("file", "SIGHUP")
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)


async def test_while_the_engine_loads_only_what_does_not_concern_it_can_change(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        loaded = await running.until_ready()
        assert loaded.ready
        child = running.front.engine.child
        assert child is not None
        child.kill()
        await running.until(lambda status: status.engine_state == "restarting")
        error = await refusal(reload(running, await with_own(running, microBatches=4)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "has not loaded yet" in (error.details() or "")
        assert (await reload(running, await with_own(running, maxQueuedRequests=7))).applied


async def test_with_a_state_directory_the_file_wins_at_start_and_the_last_version_is_named(
    tmp_path: Path,
) -> None:
    state = str(tmp_path / "state")
    async with running_front(front_config(tmp_path, 0, stateDir=state)) as running:
        await running.until_ready()
        config = await running.admin.GetConfig(pb.GetConfigRequest(), timeout=5)
        assert (config.version, config.state_dir) == (1, state)
        await reload(running, await with_level(running, 2))
    async with running_front(front_config(tmp_path, 0, stateDir=state)) as running:
        await running.until_ready()
        status = await running.status()
        assert (status.config_version, status.ep_level) == (3, 1)
        assert any("differs from version 2" in warning for warning in status.warnings)
        await running.admin.RollbackConfig(pb.RollbackConfigRequest(version=2), timeout=10)
        await tuning(running, 201)
        (tmp_path / "in-force.json").write_text(json.dumps(await document_of(running)))
    document = json.loads((tmp_path / "in-force.json").read_text())
    same = front_config(tmp_path, 0, stateDir=state)
    (tmp_path / "config.json").write_text(json.dumps(document))
    async with running_front(same.replaced_by(document, "")) as running:
        await running.until_ready()
        status = await running.status()
        assert (status.config_version, status.ep_level, list(status.warnings)) == (4, 2, [])
