"""Epochs over real gRPC, with agents that have no executor."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from router.messages import AskProgress
from tests.fake_engine import INT8_LAYERS, LOSES
from tests.router.front_fleet import front_config, request_of, running_front, tokens_of


@pytest.mark.asyncio
async def test_the_first_epoch_begins_when_all_workers_have_registered(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 2)) as running:
        first = await running.add_agent("a")
        status = await running.until(lambda status: "1 of 2" in status.not_ready_reason)
        assert not status.ready
        await running.add_agent("b")
        status = await running.until_ready()
        assert status.epoch == 1
        assert [worker.worker_id for worker in status.workers] == ["a", "b"]
        assert {worker.state for worker in status.workers} == {"serving"}
        assert [list(layer.expert_ids) for layer in first.epochs[0].layers] == [[0, 1, 2, 3]]
        assert list(first.epochs[0].int8_layers) == INT8_LAYERS
        spare = await running.add_agent("c")
        status = await running.status()
        assert status.workers[2].state == "registered"
        assert spare.epochs == []


@pytest.mark.asyncio
async def test_a_wrong_fleet_token_is_refused(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1)) as running:
        agent = await running.add_agent("a")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await agent.register(token="wrong")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.asyncio
async def test_a_spare_takes_the_rank_of_a_lost_worker_and_the_stream_goes_on(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 2)) as running:
        first = await running.add_agent("a")
        await running.add_agent("b")
        await running.until_ready()
        spare = await running.add_agent("c")
        await first.stop()
        assert await tokens_of(running, request_of([LOSES], max_tokens=4)) == [13, 14, 15, 16]
        status = await running.until(lambda status: status.ready and status.epoch > 1)
        by_name = {worker.worker_id: worker for worker in status.workers}
        assert (by_name["c"].ep_rank, by_name["b"].ep_rank, by_name["a"].state) == (0, 1, "lost")
        assert spare.epochs


@pytest.mark.asyncio
async def test_a_stopped_executor_is_restarted_and_returns_to_its_rank(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 2)) as running:
        first = await running.add_agent("a")
        await running.add_agent("b")
        await running.until_ready()
        first.executor_state = "stopped"
        assert await tokens_of(running, request_of([LOSES], max_tokens=4)) == [13, 14, 15, 16]
        status = await running.until(lambda status: status.ready and status.epoch > 1)
        assert [worker.worker_id for worker in status.workers] == ["a", "b"]
        assert status.workers[0].incarnation == 2
        assert first.restarts


@pytest.mark.asyncio
async def test_three_missed_heartbeats_lose_a_worker(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1)) as running:
        agent = await running.add_agent("a")
        await running.until_ready()
        await agent.stop()
        status = await running.until(lambda status: not status.ready)
        assert status.workers[0].state == "lost"


@pytest.mark.asyncio
async def test_a_preparation_that_fails_is_named_and_tried_again(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1)) as running:
        agent_task = asyncio.create_task(running.until(lambda s: "damaged" in s.not_ready_reason))
        agent = await running.add_agent("a")
        agent.fails_prepare = 1
        if not agent.epochs:
            await agent_task
        agent_task.cancel()
        status = await running.until_ready()
        assert status.epoch >= 1


@pytest.mark.asyncio
async def test_a_new_start_of_a_worker_ends_the_epoch_and_a_larger_one_begins(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1)) as running:
        agent = await running.add_agent("a")
        await running.until_ready()
        agent.incarnation = 9
        await agent.register()
        status = await running.until(lambda status: status.ready and status.epoch > 1)
        assert status.workers[0].incarnation == 9


@pytest.mark.asyncio
async def test_progress_is_asked_of_the_agent_and_is_none_when_it_stands_still(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1)) as running:
        agent = await running.add_agent("a")
        await running.until_ready()
        heartbeats = running.front.heartbeats
        assert heartbeats is not None
        assert await heartbeats.progress_of(0) == 9
        agent.executor_state = "stopped"
        assert await heartbeats.progress_of(0) is None
        assert await heartbeats.progress_of(5) is None
        await running.front._answer_progress(AskProgress(1, 0))
