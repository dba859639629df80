"""An expert worker's agent without an executor, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from common.grpc_server import RunningServer, start_server
from common.interceptors import FleetTokenInterceptor, token_metadata
from common.link_probe import Listener, listening, probe
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc


class FakeAgent(fleet_pb2_grpc.ExpertWorkerServiceServicer):
    """Public attributes up to `is_reachable`, `executor_state`, `fails_prepare`, `refuses` and `stops_before`
    steer it; the rest tells what was asked.

    Attributes:
        host: where it listens, on the control plane and on the data plane.
        refuses: why it takes part in no further epoch; empty where it does.
        stops_before: the event of PrepareEpoch that never comes: "loaded", "linked".
        checks: what it was asked without being told to prepare it.
        cable: what hccn_tool says of its device.
        is_reachable: whether its probes are answered at the port that it names.
        devices: what hccn_tool was asked about.
        num_probed: how many others it tried to reach.
    """

    def __init__(
        self, worker_id: str, token: str, host: str = "127.0.0.1", device_id: int | None = None
    ) -> None:
        self.worker_id = worker_id
        self.token = token
        self.host = host
        self.device_id = device_id
        self.cable: pb.DeviceLinkKind.ValueType = pb.DEVICE_LINK_KIND_UNKNOWN
        self.is_reachable = True
        self.devices: list[int] = []
        self.num_probed = 0
        self.incarnation = 1
        self.executor_state = "ready"
        self.fails_prepare = 0
        self.refuses = ""
        self.stops_before = ""
        self.checks: list[pb.CheckEpochRequest] = []
        self.epochs: list[pb.PrepareEpochRequest] = []
        self.restarts: list[str] = []
        self.fleet_address = ""
        self.server: RunningServer | None = None

    async def start(self, fleet_address: str) -> None:
        self.fleet_address = fleet_address
        self.server = await start_server(
            self.host,
            0,
            lambda server: fleet_pb2_grpc.add_ExpertWorkerServiceServicer_to_server(self, server),
            ("expertmesh.v1.ExpertWorkerService",),
            [FleetTokenInterceptor(self.token)],
        )
        await self.register()

    async def register(self, token: str | None = None) -> pb.RegisterResponse:
        async with grpc.aio.insecure_channel(self.fleet_address) as channel:
            stub: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
            return await stub.Register(
                pb.RegisterRequest(
                    worker_id=self.worker_id,
                    incarnation=self.incarnation,
                    address=self.server.address if self.server else "127.0.0.1:1",
                    device="cpu",
                    arithmetic="abc",
                    version="0.1.0",
                    data_address=self.host,
                    device_id=self.device_id,
                ),
                metadata=token_metadata(token or self.token),
                timeout=5,
            )

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)

    async def PrepareEpoch(self, request: pb.PrepareEpochRequest, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.epochs.append(request)
        if self.fails_prepare > 0:
            self.fails_prepare -= 1
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the shard is damaged")
        if self.refuses:
            yield pb.PrepareEpochResponse(refused=pb.Refused(reason=self.refuses))
            return
        yield pb.PrepareEpochResponse(loading=pb.LoadProgress(loaded_bytes=1, total_bytes=2))
        for event in (
            pb.PrepareEpochResponse(loaded=pb.Loaded(loaded_bytes=2)),
            pb.PrepareEpochResponse(linked=pb.Linked()),
        ):
            while event.WhichOneof("event") == self.stops_before:
                await asyncio.sleep(0.01)
            yield event

    async def CheckEpoch(self, request: pb.CheckEpochRequest, context: Any) -> pb.CheckEpochResponse:  # noqa: N802
        if request.incarnation != self.incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another incarnation")
        self.checks.append(request)
        return pb.CheckEpochResponse(refusal=self.refuses)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:  # noqa: N802
        if request.incarnation != self.incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another incarnation")
        return pb.HeartbeatResponse(executor_state=self.executor_state, progress=7, cpu_time_ns=2_000_000)

    async def GetDeviceLink(self, request: Any, context: Any) -> pb.GetDeviceLinkResponse:  # noqa: N802
        self.devices.append(request.device_id)
        return pb.GetDeviceLinkResponse(kind=self.cable, reason="its neighbour says so")

    async def AnswerProbes(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with listening(self.host) as listener:
            token = listener.token if self.is_reachable else "of somebody else"
            yield pb.AnswerProbesResponse(
                address=pb.ProbeAddress(host=listener.host, port=listener.port, token=token)
            )
            await asyncio.sleep(60)

    async def ProbePeers(self, request: Any, context: Any) -> pb.ProbePeersResponse:  # noqa: N802
        targets = [Listener(one.host, one.port, one.token) for one in request.targets]
        self.num_probed += len(targets)
        return pb.ProbePeersResponse(failures=await probe(self.host, targets, request.timeout_s))

    async def RestartExecutor(self, request: Any, context: Any) -> pb.RestartExecutorResponse:  # noqa: N802
        self.restarts.append(request.reason)
        self.incarnation += 1
        self.executor_state = "ready"
        self._task = asyncio.create_task(self.register())
        return pb.RestartExecutorResponse(incarnation=self.incarnation)
