"""An expert worker's agent without an executor, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from common.grpc_server import RunningServer, start_server
from common.interceptors import FleetTokenInterceptor, token_metadata
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc


class FakeAgent(fleet_pb2_grpc.ExpertWorkerServiceServicer):
    """`executor_state` and `fails_prepare` steer it; `epochs` and `restarts` tell what was asked of it."""

    def __init__(self, worker_id: str, token: str) -> None:
        self.worker_id = worker_id
        self.token = token
        self.incarnation = 1
        self.executor_state = "ready"
        self.fails_prepare = 0
        self.epochs: list[pb.PrepareEpochRequest] = []
        self.restarts: list[str] = []
        self.fleet_address = ""
        self.server: RunningServer | None = None

    async def start(self, fleet_address: str) -> None:
        self.fleet_address = fleet_address
        self.server = await start_server(
            "127.0.0.1",
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
        yield pb.PrepareEpochResponse(loading=pb.LoadProgress(loaded_bytes=1, total_bytes=2))
        yield pb.PrepareEpochResponse(loaded=pb.Loaded(loaded_bytes=2))
        yield pb.PrepareEpochResponse(linked=pb.Linked())

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:  # noqa: N802
        if request.incarnation != self.incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another incarnation")
        return pb.HeartbeatResponse(executor_state=self.executor_state, progress=7, cpu_time_ns=2_000_000)

    async def RestartExecutor(self, request: Any, context: Any) -> pb.RestartExecutorResponse:  # noqa: N802
        self.restarts.append(request.reason)
        self.incarnation += 1
        self.executor_state = "ready"
        self._task = asyncio.create_task(self.register())
        return pb.RestartExecutorResponse(incarnation=self.incarnation)
