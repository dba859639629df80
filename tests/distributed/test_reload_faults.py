"""Reloads of a real fleet whose workers refuse, die or stall: the old configuration goes on, and says so."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc
import pytest

from expert_worker.executor_link import EXECUTOR_MODULE
from protos import admin_pb2
from protos import generation_pb2 as pb
from router.front.config_version import ConfigVersion
from router.front.version_files import VersionFiles
from tests.distributed.fleet_in_process import Fleet, fleet
from tests.router.reloading import document_of, refusal, reload, with_level, with_own
from tests.tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.asyncio, pytest.mark.distributed]

UNCHANGED = "the configuration in force stays as it was"
POOR = "tests.distributed.poor_executor"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, family="v3")
    return directory


async def stream(running: Fleet, max_tokens: int = 24) -> list[int]:
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    request = pb.GenerateRequest(text="Nothing is dropped silently, and", sampling=sampling)
    token_ids: list[int] = []
    async for response in running.stub.Generate(request, timeout=60):
        token_ids.extend(response.chunk.token_ids)
    return token_ids


async def versions(running: Fleet) -> list[tuple[int, bool]]:
    listed = await running.admin.ListConfigVersions(admin_pb2.ListConfigVersionsRequest(), timeout=5)
    return [(one.version, one.in_force) for one in listed.versions]


def pid_of(running: Fleet, worker: int) -> int:
    child = running.workers[worker].executor._kept.child
    assert child is not None
    return child.pid


def signalled(monkeypatch: pytest.MonkeyPatch, pid: int, how: signal.Signals) -> None:
    """Signal a process once all have prepared, right before the version is written."""
    write = VersionFiles.write

    def signal_and_write(files: VersionFiles, version: ConfigVersion) -> None:
        os.kill(pid, how)
        write(files, version)

    monkeypatch.setattr(VersionFiles, "write", signal_and_write)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_is_lost_between_prepare_and_commit_leaves_the_old_configuration_in_force(
    tmp_path: Path, model: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(tmp_path, model, 2, stateDir=str(tmp_path / "state")) as running:
        expected, before = await stream(running), await document_of(running)
        proposed = await with_level(running, 2, microBatches=2)
        with monkeypatch.context() as patched:
            signalled(patched, pid_of(running, 1), how)
            error = await refusal(reload(running, proposed))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        for words in ("expert worker w1", UNCHANGED):
            assert words in (error.details() or "")
        status = await running.status()
        assert (status.config_version, status.ep_level) == (1, 1)
        assert await document_of(running) == before
        assert await versions(running) == [(1, True)]
        # The worker is lost as any lost worker is: the next epoch has the old configuration.
        status = await running.until(lambda status: status.ready and status.epoch > 2, 60)
        assert (status.config_version, status.ep_level) == (1, 1)
        assert await stream(running) == expected
        assert (await reload(running, proposed)).version == 3
        assert await stream(running) == expected
        status = await running.status()
        assert (status.config_version, status.ep_level, status.ready) == (3, 2, True)
        assert await versions(running) == [(3, True), (1, False)]


async def test_a_worker_that_stalls_before_it_has_prepared_is_named(tmp_path: Path, model: Path) -> None:
    async with fleet(tmp_path, model, 2) as running:
        expected = await stream(running)
        os.kill(pid_of(running, 0), signal.SIGSTOP)
        error = await refusal(reload(running, await with_level(running, 2)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        for words in ("expert worker w0", UNCHANGED):
            assert words in (error.details() or "")
        status = await running.until(lambda status: status.ready and status.epoch > 2, 60)
        assert (status.config_version, status.ep_level) == (1, 1)
        assert await stream(running) == expected


@pytest.mark.parametrize("exchange", ["links", "collective"])
async def test_a_worker_without_the_memory_refuses_and_no_stream_notices(
    tmp_path: Path, model: Path, exchange: str
) -> None:
    async with fleet(tmp_path, model, 2, (EXECUTOR_MODULE, POOR), exchange=exchange) as running:
        alone = await stream(running, 200)
        running_stream = asyncio.create_task(stream(running, 200))
        await running.until(lambda status: status.num_requests_running == 1)
        # The first epoch may have been given up: a worker is called before it knows that it is registered.
        before = (await running.status()).epoch
        document = await with_own(running)
        document["ScheduleConfig"] = {"maxPrefillTokens": 1 << 20}
        would_be = await reload(running, document, dry_run=True)
        assert would_be.refusals[-1].startswith("expert worker w1 refuses: ")
        for _ in range(3):
            error = await refusal(reload(running, document))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            for words in ("refuses: the free memory of this machine for larger buffers is", UNCHANGED):
                assert words in (error.details() or "")
        assert await running_stream == alone
        await asyncio.sleep(1.2)  # nobody is taken for a worker that fails
        status = await running.status()
        assert (status.config_version, status.epoch, status.ready) == (1, before, True)
        assert {worker.state for worker in status.workers} == {"serving"}
        assert (await reload(running, await with_level(running, 2))).applied
        assert await stream(running, 200) == alone
