"""The two-server rule at start, at a reload and while serving: over real gRPC, with agents without executors.

A rank table makes two servers of two loopback addresses. The router is on the first.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.config import Effective, resolve
from common.errors import ConfigError
from protos import fleet_pb2 as pb
from router.front.server import Front
from tests.fake_agent import FakeAgent
from tests.rank_tables import write_table
from tests.router.front_fleet import TOKEN, Running, front_config, running_front
from tests.router.reloading import refusal, reload, with_level

HERE, THERE, ELSEWHERE = "127.0.0.1", "127.0.0.2", "127.0.0.3"
SWITCH, DIRECT = pb.DEVICE_LINK_KIND_SWITCH, pb.DEVICE_LINK_KIND_DIRECT
REFUSED_S = 60.0


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_servers(tmp_path, monkeypatch, HERE, THERE)


def name_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *servers: str) -> None:
    """One device with the number 4 + its rank on each server."""
    file = write_table(tmp_path, {server: {4 + rank: rank} for rank, server in enumerate(servers)})
    monkeypatch.setenv("RANK_TABLE_FILE", str(file))


def at_level_2(tmp_path: Path, world_size: int = 2, **own: Any) -> Effective:
    file = front_config(tmp_path, world_size, **own).file
    assert file is not None
    document = json.loads(file.read_text())
    document["ModelDeployConfig"]["ModelConfig"][0]["models"] = {"deepseekv2": {"ep_level": 2}}
    file.write_text(json.dumps(document))
    return resolve(file)


async def refused(at_start: Effective, agents: Sequence[FakeAgent]) -> str:
    """Start a router and its agents; return the sentence it ends with."""
    front = Front(at_start, engine_module="tests.fake_engine")
    line = await front.listen()
    work = asyncio.create_task(front.run())
    try:
        address = dict(part.split("=") for part in line.split()[1:])["fleet"]
        for agent in agents:
            await agent.start(address)
        with pytest.raises(ConfigError) as caught:
            async with asyncio.timeout(REFUSED_S):
                await asyncio.shield(work)
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await front.close()
        await asyncio.gather(*(agent.stop() for agent in agents))
    return str(caught.value)


def two_agents(**steering: Any) -> list[FakeAgent]:
    """One on each server; `steering` is of the second."""
    agents = [FakeAgent("a", TOKEN, HERE), FakeAgent("b", TOKEN, THERE)]
    for name, value in steering.items():
        setattr(agents[1], name, value)
    return agents


@asynccontextmanager
async def serving(at_start: Effective, **steering: Any) -> AsyncIterator[Running]:
    async with running_front(at_start) as running:
        await running.add_agent("a", HERE)
        await running.add_agent("b", THERE, **steering)
        await running.until_ready()
        yield running


@pytest.mark.asyncio
async def test_servers_whose_pairs_reach_each_other_may_serve(tmp_path: Path) -> None:
    async with serving(at_level_2(tmp_path)) as running:
        # hccn_tool was asked about the devices of the table; links are between the router and each worker.
        assert [agent.devices for agent in running.agents] == [[4], [5]]
        assert [agent.num_probed for agent in running.agents] == [0, 1]


@pytest.mark.asyncio
async def test_in_one_group_workers_try_to_reach_each_other_too(tmp_path: Path) -> None:
    async with serving(at_level_2(tmp_path, exchange="collective")) as running:
        assert [agent.num_probed for agent in running.agents] == [1, 2]


@pytest.mark.asyncio
async def test_a_pair_that_cannot_talk_is_refused_before_anybody_loads(tmp_path: Path) -> None:
    agents = two_agents(is_reachable=False)
    sentence = await refused(at_level_2(tmp_path), agents)
    assert sentence.startswith(
        "ep_level is 2 on the two servers 127.0.0.1 and 127.0.0.2, which needs a switch between them, but "
        "the router on 127.0.0.1 does not reach expert worker b (ep_rank 1) on 127.0.0.2 (127.0.0.2:"
    )
    assert "set ep_level to 1" in sentence
    assert [agent.epochs for agent in agents] == [[], []]


@pytest.mark.asyncio
async def test_a_cable_to_another_npu_is_refused_before_anybody_loads(tmp_path: Path) -> None:
    agents = two_agents(cable=DIRECT)
    sentence = await refused(at_level_2(tmp_path), agents)
    assert "device 5 of 127.0.0.2 is connected to another NPU: its neighbour says so" in sentence
    assert "connect them through a switch, or set ep_level to 1" in sentence
    assert [agent.epochs for agent in agents] == [[], []]
    assert [agent.num_probed for agent in agents] == [0, 0]


@pytest.mark.asyncio
async def test_what_the_operator_says_is_believed(tmp_path: Path) -> None:
    sentence = await refused(at_level_2(tmp_path, topology="direct"), two_agents(cable=SWITCH))
    assert "ExpertMesh.topology says that they are connected directly" in sentence
    async with serving(at_level_2(tmp_path, topology="switch"), cable=DIRECT) as running:
        assert [agent.devices for agent in running.agents] == [[], []]


@pytest.mark.asyncio
async def test_nothing_is_asked_where_the_rule_does_not_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(front_config(tmp_path, 2), cable=DIRECT) as running:
        assert [agent.devices for agent in running.agents] == [[], []]
    name_servers(tmp_path, monkeypatch, HERE, THERE, ELSEWHERE)
    async with running_front(at_level_2(tmp_path, 3, redundantExperts=1)) as running:
        for name, host in (("a", HERE), ("b", THERE), ("c", ELSEWHERE)):
            await running.add_agent(name, host, cable=DIRECT)
        await running.until_ready()
        assert [agent.devices for agent in running.agents] == [[], [], []]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.asyncio
async def test_a_reload_to_level_2_is_refused_and_nothing_changes(tmp_path: Path, dry_run: bool) -> None:
    async with serving(front_config(tmp_path, 2), cable=DIRECT) as running:
        proposal = await with_level(running, 2)
        if dry_run:
            (why,) = (await reload(running, proposal, dry_run=True)).refusals
        else:
            error = await refusal(reload(running, proposal))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            why = str(error.details())
        assert "device 5 of 127.0.0.2 is connected to another NPU" in why
        status = await running.status()
        assert (status.ready, status.ep_level, status.epoch, status.config_version) == (True, 1, 1, 1)


@pytest.mark.asyncio
async def test_a_reload_to_level_2_is_taken_where_the_pairs_reach_each_other(tmp_path: Path) -> None:
    async with serving(front_config(tmp_path, 2)) as running:
        assert (await reload(running, await with_level(running, 2))).applied
        status = await running.status()
        assert (status.ready, status.ep_level, status.epoch) == (True, 2, 2)


@pytest.mark.asyncio
async def test_a_fleet_that_comes_back_over_another_cable_waits_and_says_why(tmp_path: Path) -> None:
    async with serving(at_level_2(tmp_path)) as running:
        agent = running.agents[1]
        agent.incarnation, agent.cable = 2, DIRECT
        await agent.register()
        status = await running.until(lambda status: "another NPU" in status.not_ready_reason)
        assert (status.ready, status.epoch, len(agent.epochs)) == (False, 1, 1)
        # The way out that the sentence names.
        assert (await reload(running, await with_level(running, 1))).applied
        status = await running.until_ready()
        assert status.epoch == 2
