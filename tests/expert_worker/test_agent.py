"""An agent with a real executor, and a router that is only its fleet port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from common.config import load_config
from common.errors import CheckpointError, ConfigError, ControlError
from common.grpc_server import RunningServer, start_server
from common.interceptors import FleetTokenInterceptor, token_metadata
from common.link_probe import Listener, listening, probe
from expert_worker.agent import Agent
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc
from tests.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.asyncio

TOKEN = "a-token-of-the-tests"
DEADLINE_S = 30.0
INTERVAL_S = 0.2


class FleetPort(fleet_pb2_grpc.FleetServiceServicer):
    """The fleet port of a router; `known` are the introductions it got."""

    def __init__(self, term: int = 11) -> None:
        self.term = term
        self.known: list[pb.RegisterRequest] = []
        self.answer_delay_s = 0.0
        self.server: RunningServer | None = None

    async def start(self, port: int = 0) -> str:
        self.server = await start_server(
            "127.0.0.1",
            port,
            lambda server: fleet_pb2_grpc.add_FleetServiceServicer_to_server(self, server),
            ("expertmesh.v1.FleetService",),
            [FleetTokenInterceptor(TOKEN)],
        )
        return self.server.address

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:  # noqa: N802
        self.known.append(request)
        await asyncio.sleep(self.answer_delay_s)
        return pb.RegisterResponse(term=self.term, heartbeat_interval_s=INTERVAL_S)


class Running:
    """A registered agent, and calls to it as its router would make them."""

    def __init__(self, agent: Agent, port: FleetPort, work: asyncio.Task[None]) -> None:
        self.agent = agent
        self.port = port
        self.work = work

    @property
    def last(self) -> pb.RegisterRequest:
        return self.port.known[-1]

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[fleet_pb2_grpc.ExpertWorkerServiceAsyncStub]:
        async with grpc.aio.insecure_channel(self.last.address) as channel:
            yield fleet_pb2_grpc.ExpertWorkerServiceStub(channel)

    async def heartbeat(
        self, term: int | None = None, incarnation: int | None = None
    ) -> pb.HeartbeatResponse:
        request = pb.HeartbeatRequest(
            term=self.port.term if term is None else term,
            incarnation=self.last.incarnation if incarnation is None else incarnation,
        )
        async with self.stub() as stub:
            return await stub.Heartbeat(request, timeout=5, metadata=token_metadata(TOKEN))

    async def until(self, claim: Callable[[], object], beats: bool = True) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not claim():
                if beats:
                    with contextlib.suppress(grpc.aio.AioRpcError):  # refused while the executor changes
                        await self.heartbeat()
                await asyncio.sleep(0.05)


def agent_of(tmp_path: Path, router: str, **own: Any) -> Agent:
    (tmp_path / "token").write_text(TOKEN)
    file = tmp_path / "worker.json"
    own = {"fleetTokenFile": str(tmp_path / "token"), "router": router, "workerId": "w0", "threads": 1} | own
    file.write_text(json.dumps({"ExpertMesh": own}))
    return Agent(load_config(file))


@asynccontextmanager
async def running(tmp_path: Path, **own: Any) -> AsyncIterator[Running]:
    port = FleetPort()
    agent = agent_of(tmp_path, await port.start(), **own)
    await agent.listen()
    work = asyncio.create_task(agent.run())
    one = Running(agent, port, work)
    try:
        await one.until(lambda: port.known, beats=False)
        yield one
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await agent.close()
        await port.stop()
        assert not [child for child in psutil.Process().children() if "executor" in " ".join(child.cmdline())]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_an_agent_introduces_its_executor_and_answers_only_its_own_router(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        assert (one.last.worker_id, one.last.device) == ("w0", "cpu")
        assert len(one.last.arithmetic) == 16
        assert (await one.heartbeat()).executor_state == "idle"
        for wrong in ({"term": 10}, {"incarnation": 5}):
            error = await refusal(one.heartbeat(**wrong))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        async with one.stub() as stub:
            error = await refusal(stub.Heartbeat(pb.HeartbeatRequest(term=11), timeout=5))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_router_may_call_before_the_answer_to_the_registration_has_been_read(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        await one.heartbeat()
        number = one.port.server.port if one.port.server is not None else 0
        await one.port.stop()
        one.port.term, one.port.answer_delay_s = 12, 1.0
        one.port.known.clear()
        await one.port.start(number)
        await one.until(lambda: one.port.known, beats=False)
        assert one.agent.registration.term == 11
        assert (await one.heartbeat()).executor_state == "idle"
        assert one.agent.registration.term == 12


async def test_a_stopped_executor_is_seen_and_replaced_when_the_router_asks(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        first = one.last.incarnation
        child = next(p for p in psutil.Process().children() if "expert_worker.executor" in p.cmdline())
        child.suspend()
        await one.until(lambda: child.status() == psutil.STATUS_STOPPED)
        assert (await one.heartbeat()).executor_state == "stopped"
        async with one.stub() as stub:
            request = pb.RestartExecutorRequest(term=11, incarnation=first, reason="it is stopped")
            answer = await stub.RestartExecutor(request, timeout=30, metadata=token_metadata(TOKEN))
        assert answer.incarnation != first
        await one.until(lambda: one.last.incarnation == answer.incarnation)
        assert (await one.heartbeat()).executor_state == "idle"


async def test_an_executor_that_dies_is_introduced_again_with_another_incarnation(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        first = one.last.incarnation
        child = next(p for p in psutil.Process().children() if "expert_worker.executor" in p.cmdline())
        os.kill(child.pid, signal.SIGKILL)
        await one.until(lambda: one.last.incarnation != first)


async def test_an_agent_whose_router_falls_silent_registers_with_the_next(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        assert one.port.server is not None
        number = one.port.server.port
        await one.port.stop()
        following = FleetPort(term=12)
        await asyncio.sleep(3 * INTERVAL_S)
        await following.start(number)
        one.port = following
        await one.until(lambda: following.known, beats=False)
        await one.until(lambda: one.agent.registration.term == 12)
        assert (await one.heartbeat()).executor_state == "idle"
        assert (await refusal(one.heartbeat(term=11))).code() is grpc.StatusCode.FAILED_PRECONDITION
        await following.stop()


async def test_an_agent_gives_up_when_no_router_comes(tmp_path: Path) -> None:
    agent = agent_of(tmp_path, "127.0.0.1:9", registerTimeoutSeconds=1.0)
    await agent.listen()
    try:
        with pytest.raises(ControlError, match="within 1 s"):
            await asyncio.wait_for(agent.run(), DEADLINE_S)
    finally:
        await agent.close()


async def test_a_checkpoint_that_cannot_be_held_ends_the_worker_after_the_router_was_told(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as one:
        request = pb.PrepareEpochRequest(
            term=11,
            incarnation=one.last.incarnation,
            epoch=1,
            ep_size=1,
            model_path=str(tmp_path / "nowhere"),
            dtype="float32",
            layers=[pb.LayerExperts(layer_id=1, expert_ids=[0])],
        )
        async with one.stub() as stub:
            call = stub.PrepareEpoch(request, timeout=20, metadata=token_metadata(TOKEN))
            error = await refusal(anext(aiter(call)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "nowhere" in (error.details() or "")
        with pytest.raises(CheckpointError, match="nowhere"):
            await asyncio.wait_for(one.work, DEADLINE_S)


async def test_a_worker_without_a_router_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "worker.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"ExpertMesh\.router"):
        Agent(load_config(file))


def caller(one: Running) -> dict[str, Any]:
    return {"term": 11, "incarnation": one.last.incarnation}


async def test_an_agent_says_where_it_is_and_which_device_it_has(tmp_path: Path) -> None:
    async with running(tmp_path, dataAddress="127.0.0.2", deviceId=5) as one:
        assert (one.last.data_address, one.last.device_id) == ("127.0.0.2", 5)


async def test_an_agent_answers_probes_while_the_call_lasts_and_tries_others(tmp_path: Path) -> None:
    async with running(tmp_path, dataAddress="127.0.0.2") as one, one.stub() as stub:
        metadata = token_metadata(TOKEN)
        assert not one.last.HasField("device_id")
        call = stub.AnswerProbes(pb.AnswerProbesRequest(**caller(one)), metadata=metadata)
        address = (await anext(aiter(call))).address
        listener = Listener(address.host, address.port, address.token)
        assert listener.host == "127.0.0.2"
        assert await probe("127.0.0.1", [listener], DEADLINE_S) == [""]
        async with listening("127.0.0.1") as ours:
            names = [ours, Listener(ours.host, ours.port, "of another")]
            targets = [pb.ProbeAddress(host=one.host, port=one.port, token=one.token) for one in names]
            request = pb.ProbePeersRequest(**caller(one), targets=targets, timeout_s=DEADLINE_S)
            failures = (await stub.ProbePeers(request, metadata=metadata)).failures
        assert list(failures) == ["", f"127.0.0.1:{ours.port} is answered by somebody else"]
        call.cancel()
        async with asyncio.timeout(DEADLINE_S):
            while await probe("127.0.0.1", [listener], DEADLINE_S) == [""]:
                await asyncio.sleep(0.05)


async def test_an_agent_asks_hccn_tool_and_nobody_but_its_router_may_have_it_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "hccn_tool"
    tool.write_text('#!/bin/sh\necho "System Description TLV"; echo "AscendNPU $*"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    async with running(tmp_path) as one, one.stub() as stub:
        request = pb.GetDeviceLinkRequest(**caller(one), device_id=7, timeout_s=DEADLINE_S)
        answer = await stub.GetDeviceLink(request, metadata=token_metadata(TOKEN))
        assert answer.kind == pb.DEVICE_LINK_KIND_DIRECT
        assert answer.reason == "its neighbour describes itself as 'AscendNPU -i 7 -lldp -g'"
        request.term = 12
        error = await refusal(stub.GetDeviceLink(request, metadata=token_metadata(TOKEN)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_worker_that_has_too_little_memory_ends_before_it_loads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "v3", vocab_size=512)
    async with running(tmp_path) as one:
        request = pb.PrepareEpochRequest(
            **caller(one),
            epoch=1,
            ep_size=1,
            model_path=str(tmp_path / "model"),
            dtype="float32",
            layers=[pb.LayerExperts(layer_id=1, expert_ids=[0])],
            buffer_bytes=1 << 60,
        )
        async with one.stub() as stub:
            call = stub.PrepareEpoch(request, timeout=DEADLINE_S, metadata=token_metadata(TOKEN))
            error = await refusal(anext(aiter(call)))
        assert "the free memory of this machine for the expert worker of ep_rank 0 is " in str(
            error.details()
        )
        # An expert has 3 x 32 x 64 float32.
        assert "1073741824.0 GiB (24576 bytes of weights, 1073741824.0 GiB of buffers) is" in str(
            error.details()
        )
        with pytest.raises(ConfigError, match="use more expert workers"):
            await asyncio.wait_for(one.work, DEADLINE_S)
        assert one.agent.executor.loaded_bytes == 0
