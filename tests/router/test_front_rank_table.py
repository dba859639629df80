"""RANK_TABLE_FILE fixes the ranks: over real gRPC, with agents that have no executor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import grpc
import pytest

from common.errors import ConfigError
from router.front.server import Front
from tests.rank_tables import write_table
from tests.router.front_fleet import Running, front_config, running_front

HERE, THERE = "127.0.0.1", "127.0.0.2"
FOUR = {HERE: {0: 3, 1: 0}, THERE: {0: 2, 1: 1}}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return name_table(tmp_path, monkeypatch, FOUR)


def name_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: Mapping[str, Mapping[int, int]]
) -> Path:
    file = write_table(tmp_path, servers)
    monkeypatch.setenv("RANK_TABLE_FILE", str(file))
    return file


async def ranks_of(running: Running) -> list[str]:
    """The members by ep_rank."""
    status = await running.until_ready()
    members = sorted((worker.ep_rank, worker.worker_id) for worker in status.workers if worker.ep_rank >= 0)
    assert [rank for rank, _ in members] == list(range(len(members)))
    return [name for _, name in members]


@pytest.mark.asyncio
async def test_a_worker_gets_the_rank_of_its_device_whoever_comes_first(table: Path, tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 4)) as running:
        for name, host, device in (("d", THERE, 1), ("c", HERE, 0), ("a", THERE, 0), ("b", HERE, 1)):
            await running.add_agent(name, host, device)
        assert await ranks_of(running) == ["b", "d", "a", "c"]
        by_name = {agent.worker_id: agent for agent in running.agents}
        assert [by_name[name].epochs[0].ep_rank for name in "bdac"] == [0, 1, 2, 3]


@pytest.mark.asyncio
async def test_workers_of_one_server_without_a_device_are_seated_by_name(table: Path, tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 4)) as running:
        for name, host in (("w-10", HERE), ("w-9", THERE), ("w-2", HERE), ("w-8", THERE)):
            await running.add_agent(name, host)
        assert await ranks_of(running) == ["w-10", "w-9", "w-8", "w-2"]


@pytest.mark.asyncio
async def test_a_new_start_of_a_worker_gets_its_rank_again(table: Path, tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 4)) as running:
        for name, host in (("a", HERE), ("b", HERE), ("c", THERE), ("d", THERE)):
            await running.add_agent(name, host)
        before = await ranks_of(running)
        running.agents[1].incarnation = 9
        await running.agents[1].register()
        await running.until(lambda status: status.ready and status.epoch > 1)
        assert await ranks_of(running) == before


@pytest.mark.asyncio
async def test_a_worker_that_the_table_does_not_know_is_refused_by_name(table: Path, tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 4)) as running:
        for name, host, device, why in (
            ("stranger", "127.0.0.3", None, "no server with the address 127.0.0.3"),
            ("lost", HERE, 5, "no device 5 at 127.0.0.1, but 0, 1"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await running.add_agent(name, host, device)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert f"expert worker {name} is refused: the rank table has {why}" in str(caught.value.details())
        assert list((await running.status()).workers) == []


@pytest.mark.asyncio
async def test_a_worker_whose_ranks_others_have_may_come_again_later(table: Path, tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 4)) as running:
        await running.add_agent("a", HERE)
        await running.add_agent("b", HERE, 0)
        for device, why in (
            (None, "ranks 3, 0 for expert worker c, and a, b"),
            (0, "rank 3 for expert worker"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await running.add_agent("c", HERE, device)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert why in str(caught.value.details())
        await running.agents[0].stop()
        await running.until(lambda status: any(worker.state == "lost" for worker in status.workers))
        await running.add_agent("c", HERE)


@pytest.mark.parametrize("world_size", [2, 5])
def test_a_world_of_another_size_than_the_tables_is_refused(
    table: Path, tmp_path: Path, world_size: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        Front(front_config(tmp_path, world_size, redundantExperts=2 if world_size == 5 else 0))
    assert str(caught.value) == (
        f"ModelConfig[0].worldSize is {world_size}, but the number of ranks in the rank table (4) is needed: "
        "set it to 4, or correct the table that RANK_TABLE_FILE names"
    )


def test_a_bad_table_is_one_sentence_and_nothing_starts(table: Path, tmp_path: Path) -> None:
    table.write_text(table.read_text().replace('"completed"', '"initializing"'))
    with pytest.raises(
        ConfigError, match='status is "initializing", but must be "completed": wait'
    ) as caught:
        Front(front_config(tmp_path, 4))
    assert str(caught.value).startswith(f"{table}: ")


def test_a_router_without_workers_needs_no_table(table: Path, tmp_path: Path) -> None:
    table.write_text("{}")
    Front(front_config(tmp_path, 0))
