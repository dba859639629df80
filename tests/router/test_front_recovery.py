"""What the front does while answers wait: it says so, queues, lets go of who leaves, and gives up in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from protos import generation_pb2 as pb
from tests.fake_agent import FakeAgent
from tests.fake_engine import DIES, DIES_ALWAYS, LOSES, LOSES_ALWAYS, SILENT, SLOW
from tests.router.front_fleet import Running, front_config, request_of, running_front, tokens_of
from tests.router.reloading import reload, with_own
from tests.router.test_front_streams import detail_of

pytestmark = pytest.mark.asyncio

WAIT_FOREVER_S = 86400


@asynccontextmanager
async def recovering(
    tmp_path: Path, timeout_s: float
) -> AsyncIterator[tuple[Running, asyncio.Task[list[int]]]]:
    """A front whose only worker has stopped for good in the middle of an answer."""
    async with running_front(front_config(tmp_path, 1, recoveryTimeoutSeconds=timeout_s)) as running:
        agent = await running.add_agent("a")
        await running.until_ready()
        await agent.stop()
        stream = asyncio.create_task(tokens_of(running, request_of([LOSES], max_tokens=4), 60))
        await running.until(lambda status: status.not_ready_reason.startswith("recovering: "))
        yield running, stream
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)


async def another_worker(running: Running) -> FakeAgent:
    return await running.add_agent("b")


async def failure(work: asyncio.Task[list[int]]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(20):
            await work
    return caught.value


async def test_the_status_says_who_was_lost_and_how_many_streams_wait_and_counts_what_was_survived(
    tmp_path: Path,
) -> None:
    async with recovering(tmp_path, WAIT_FOREVER_S) as (running, stream):
        queued = asyncio.create_task(tokens_of(running, request_of([20], max_tokens=2)))
        reason = (await running.until(lambda s: "2 streams wait" in s.not_ready_reason)).not_ready_reason
        assert "expert worker a (ep_rank 0) was lost at layer 1 in phase combine" in reason
        status = await running.until(lambda status: "0 of 1 expert workers" in status.not_ready_reason)
        assert (status.ready, status.recoveries, status.recovery_seconds) == (False, 0, 0)
        await another_worker(running)
        assert await stream == [13, 14, 15, 16]
        assert await queued == [30, 31]
        status = await running.until(lambda status: status.recoveries == 1)
        assert (status.ready, status.replayed_steps_total) == (True, 1)
        assert 0 < status.recovery_seconds < 20


async def test_when_the_time_is_over_everybody_hears_who_was_lost_and_how_long_they_waited(
    tmp_path: Path,
) -> None:
    async with recovering(tmp_path, 1.0) as (running, stream):
        queued = asyncio.create_task(tokens_of(running, request_of([20])))
        for error in (await failure(stream), await failure(queued)):
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert detail_of(error, error_details_pb2.ErrorInfo).reason == "WORKER_LOST"
            for words in (
                "expert worker a",
                "layer 1",
                "phase combine",
                "within 1.0 s",
                "recoveryTimeoutSeconds",
            ):
                assert words in str(error.details())
        status = await running.status()
        assert not status.not_ready_reason.startswith("recovering")
        # From now on nobody is queued for a fleet that does not come back, and the engine knows of nobody.
        late = await failure(asyncio.create_task(tokens_of(running, request_of([20]))))
        assert detail_of(late, error_details_pb2.ErrorInfo).reason == "NOT_READY"
        await another_worker(running)
        status = await running.until_ready()
        assert (status.num_requests_running, status.recoveries) == (0, 0)
        assert await tokens_of(running, request_of([20], max_tokens=2)) == [30, 31]


async def test_a_timeout_of_0_ends_answers_at_once(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1, recoveryTimeoutSeconds=0)) as running:
        await running.add_agent("a")
        await running.until_ready()
        began_s = time.monotonic()
        error = await failure(asyncio.create_task(tokens_of(running, request_of([LOSES]))))
        assert time.monotonic() - began_s < 5
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await running.until_ready()
        assert await tokens_of(running, request_of([20], max_tokens=2)) == [30, 31]


async def test_a_step_that_loses_its_worker_every_time_does_not_wait_forever(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1, recoveryTimeoutSeconds=1.5)) as running:
        await running.add_agent("a")
        epoch = (await running.until_ready()).epoch
        error = await failure(asyncio.create_task(tokens_of(running, request_of([LOSES_ALWAYS]))))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        status = await running.until_ready()
        assert status.epoch > epoch + 1
        assert status.replayed_steps_total == 0
        assert await tokens_of(running, request_of([20], max_tokens=2)) == [30, 31]


async def test_an_epoch_that_is_lost_before_all_workers_have_said_that_they_are_linked_is_not_begun(
    tmp_path: Path,
) -> None:
    async with running_front(front_config(tmp_path, 1)) as running:
        agent = await running.add_agent("a")
        await running.until_ready()
        agent.stops_before = "linked"
        stream = asyncio.create_task(tokens_of(running, request_of([LOSES_ALWAYS])))
        async with asyncio.timeout(10):
            while len(agent.epochs) < 4:
                status = await running.status()
                assert not status.ready or status.epoch == 1
                await asyncio.sleep(0.01)
        stream.cancel()
        agent.stops_before = ""
        await running.until_ready()
        assert await tokens_of(running, request_of([20], max_tokens=2)) == [30, 31]


async def test_a_reload_changes_how_long_answers_still_wait(tmp_path: Path) -> None:
    async with recovering(tmp_path, WAIT_FOREVER_S) as (running, stream):
        assert (await reload(running, await with_own(running, recoveryTimeoutSeconds=0.5))).applied
        assert "recoveryTimeoutSeconds is 0.5" in str((await failure(stream)).details())


async def test_who_leaves_or_is_overdue_while_answers_wait_is_forgotten(tmp_path: Path) -> None:
    async with recovering(tmp_path, WAIT_FOREVER_S) as (running, stream):
        overdue = await failure(asyncio.create_task(tokens_of(running, request_of([20]), timeout_s=0.3)))
        assert overdue.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        named = request_of([21])
        named.request_id = "named"
        aborted = asyncio.create_task(tokens_of(running, named))
        await running.until(lambda status: "2 streams wait" in status.not_ready_reason)
        await running.stub.Abort(pb.AbortRequest(request_ids=["named"]))
        assert await aborted == []
        stream.cancel()
        await running.until(lambda status: "0 streams wait" in status.not_ready_reason)
        await another_worker(running)
        status = await running.until(lambda status: status.recoveries == 1)
        assert (status.ready, status.num_requests_running) == (True, 0)


async def test_the_queue_is_bounded_while_answers_wait(tmp_path: Path) -> None:
    async with recovering(tmp_path, WAIT_FOREVER_S) as (running, _):
        assert (await reload(running, await with_own(running, maxQueuedRequests=1))).applied
        queued = asyncio.create_task(tokens_of(running, request_of([20])))
        await running.until(lambda status: "2 streams wait" in status.not_ready_reason)
        refused = await failure(asyncio.create_task(tokens_of(running, request_of([20]))))
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        queued.cancel()


async def test_an_engine_that_is_stopped_is_not_taken_for_lost(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1, recoveryTimeoutSeconds=0)) as running:
        await running.add_agent("a")
        await running.until_ready()
        stream = asyncio.create_task(tokens_of(running, request_of([SILENT])))
        await running.until(lambda _: len(running.front.journal) == 1)
        assert running.work is not None
        running.work.cancel()
        await asyncio.gather(running.work, return_exceptions=True)
        await asyncio.sleep(0.1)
        await running.front.close()
        error = await failure(stream)
        assert detail_of(error, error_details_pb2.ErrorInfo).reason == "DRAINING"


async def test_draining_while_answers_wait_ends(tmp_path: Path) -> None:
    async with recovering(tmp_path, WAIT_FOREVER_S) as (running, stream):
        async with asyncio.timeout(5):
            await running.front.drain(0.2)
        await running.front.close()
        error = await failure(stream)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert detail_of(error, error_details_pb2.ErrorInfo).reason == "DRAINING"


@pytest.mark.parametrize("num_workers", [0, 1])
async def test_a_stream_goes_on_with_its_next_token_when_the_engine_dies(
    tmp_path: Path, num_workers: int
) -> None:
    async with running_front(front_config(tmp_path, num_workers)) as running:
        for _ in range(num_workers):
            await running.add_agent("a")
        await running.until_ready()
        dies = asyncio.create_task(tokens_of(running, request_of([DIES], max_tokens=6, logprobs=0)))
        slow = asyncio.create_task(tokens_of(running, request_of([SLOW], max_tokens=6)))
        reason = (await running.until(lambda status: not status.ready)).not_ready_reason
        for words in ("recovering: the router's engine ended with status 3", "2 streams wait"):
            assert words in reason
        # It has not loaded yet, and knows of nobody: who comes now is queued with the others.
        queued = asyncio.create_task(tokens_of(running, request_of([20], max_tokens=3)))
        assert await dies == [12, 13, 14, 15, 16, 17]
        assert await slow == [11, 12, 13, 14, 15, 16]
        assert await queued == [30, 31, 32]
        status = await running.until(lambda status: status.num_requests_running == 0)
        assert (status.ready, status.recoveries) == (True, 1)


async def test_a_request_that_ends_every_engine_does_not_wait_forever(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0, recoveryTimeoutSeconds=2)) as running:
        await running.until_ready()
        error = await failure(asyncio.create_task(tokens_of(running, request_of([DIES_ALWAYS]))))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert detail_of(error, error_details_pb2.ErrorInfo).reason == "ENGINE_LOST"
        assert "the router's engine ended with status 3" in str(error.details())
        await running.until_ready()
        assert await tokens_of(running, request_of([20], max_tokens=2)) == [30, 31]
