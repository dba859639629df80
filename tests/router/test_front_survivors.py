"""Workers that hold all experts go on without the one that was lost, and take it in when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from protos import admin_pb2
from tests.fake_agent import FakeAgent
from tests.fake_engine import LOSES, SLOW
from tests.router.front_fleet import Running, front_config, request_of, running_front, tokens_of
from tests.router.reloading import reload, with_level

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def three(
    tmp_path: Path, redundant_experts: int = 10
) -> AsyncIterator[tuple[Running, list[FakeAgent]]]:
    """A fleet of three; with ten redundant experts each of the eight is on two of them or more."""
    own: dict[str, Any] = {"redundantExperts": redundant_experts}
    async with running_front(front_config(tmp_path, 3, **own)) as running:
        agents = [await running.add_agent(name) for name in "abc"]
        await running.until_ready()
        yield running, agents


def ranks(status: admin_pb2.GetStatusResponse) -> dict[str, int]:
    return {worker.worker_id: worker.ep_rank for worker in status.workers if worker.ep_rank >= 0}


def experts_of(agent: FakeAgent) -> list[list[int]]:
    """In the last epoch it was asked to prepare."""
    return [list(layer.expert_ids) for layer in agent.epochs[-1].layers]


async def test_the_survivors_go_on_at_once_with_what_they_hold_and_the_other_joins_later(
    tmp_path: Path,
) -> None:
    async with three(tmp_path) as (running, agents):
        held = [experts_of(agent) for agent in agents]
        assert (await running.status()).coverage == 1.0
        await agents[0].stop()  # ep_rank 0, whom the engine loses
        assert await tokens_of(running, request_of([LOSES], max_tokens=4)) == [13, 14, 15, 16]
        status = await running.until_ready()
        assert ranks(status) == {"b": 0, "c": 1}
        assert [experts_of(agent) for agent in agents[1:]] == held[1:]
        assert [(agent.epochs[-1].ep_rank, agent.epochs[-1].ep_size) for agent in agents[1:]] == [
            (0, 2),
            (1, 2),
        ]
        assert any("2 of 3 expert workers serve" in warning for warning in status.warnings)
        assert status.coverage < 1
        epoch = status.epoch

        stream = asyncio.create_task(tokens_of(running, request_of([SLOW], max_tokens=30)))
        agents[0].incarnation = 2
        await agents[0].start(running.addresses["fleet"])
        status = await running.until(lambda status: len(ranks(status)) == 3)
        assert ranks(status) == {"a": 0, "b": 1, "c": 2}
        assert (status.epoch, status.ready, status.recoveries) == (epoch + 1, True, 1)
        assert [experts_of(agent) for agent in agents] == held
        assert await stream == [11 + i for i in range(30)]
        status = await running.status()
        assert (status.recoveries, status.coverage) == (1, 1.0)
        assert not any("expert workers serve" in warning for warning in status.warnings)


async def test_where_an_expert_was_with_the_lost_one_alone_it_is_waited_for(tmp_path: Path) -> None:
    async with three(tmp_path, redundant_experts=1) as (running, agents):
        await agents[0].stop()
        stream = asyncio.create_task(tokens_of(running, request_of([LOSES], max_tokens=4)))
        await running.until(lambda status: "2 of 3 expert workers" in status.not_ready_reason)
        await running.add_agent("spare")
        assert await stream == [13, 14, 15, 16]
        assert ranks(await running.status()) == {"spare": 0, "b": 1, "c": 2}


async def test_one_that_cannot_join_disturbs_nobody_and_is_tried_again(tmp_path: Path) -> None:
    async with three(tmp_path) as (running, agents):
        await agents[0].stop()
        assert await tokens_of(running, request_of([LOSES], max_tokens=2)) == [13, 14]
        spare = await running.add_agent("spare", fails_prepare=2)
        await running.until(lambda _: spare.fails_prepare < 2)
        assert (await running.status()).ready
        assert await tokens_of(running, request_of([20], max_tokens=2)) == [30, 31]
        status = await running.until(lambda status: len(ranks(status)) == 3)
        assert ranks(status) == {"spare": 0, "b": 1, "c": 2}
        assert status.recoveries == 1


async def test_a_newcomer_that_dies_while_it_loads_is_let_go(tmp_path: Path) -> None:
    async with three(tmp_path) as (running, agents):
        await agents[0].stop()
        assert await tokens_of(running, request_of([LOSES], max_tokens=2)) == [13, 14]
        newcomer = await running.add_agent("spare", stops_before="loaded")
        await running.until(lambda _: bool(newcomer.epochs))
        epoch = (await running.status()).epoch
        newcomer.incarnation = 2
        newcomer.stops_before = ""
        await newcomer.register()
        status = await running.until(lambda status: len(ranks(status)) == 3)
        assert status.epoch > epoch
        assert (status.ready, status.recoveries) == (True, 1)


async def test_a_loss_while_a_newcomer_loads_does_not_wait_for_it(tmp_path: Path) -> None:
    # With sixteen redundant experts everybody holds everything.
    async with three(tmp_path, redundant_experts=16) as (running, agents):
        await agents[0].stop()
        assert await tokens_of(running, request_of([LOSES], max_tokens=2)) == [13, 14]
        newcomer = await running.add_agent("spare", stops_before="loaded")
        await running.until(lambda _: bool(newcomer.epochs))
        await agents[1].stop()
        assert await tokens_of(running, request_of([LOSES], max_tokens=4)) == [13, 14, 15, 16]
        assert ranks(await running.until_ready()) == {"c": 0}


async def test_a_reload_goes_first_and_the_newcomer_joins_what_it_has_put_in_force(tmp_path: Path) -> None:
    async with three(tmp_path) as (running, agents):
        await agents[0].stop()
        assert await tokens_of(running, request_of([LOSES], max_tokens=2)) == [13, 14]
        newcomer = await running.add_agent("spare", stops_before="loaded")
        await running.until(lambda _: bool(newcomer.epochs))
        assert (await reload(running, await with_level(running, 2))).applied
        newcomer.stops_before = ""
        status = await running.until(lambda status: len(ranks(status)) == 3)
        assert (status.ep_level, status.recoveries) == (2, 1)
        assert newcomer.epochs[-1].ep_level == 2
