"""The router's calls to one expert worker's agent. Every call has a deadline."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from common.errors import ControlError
from common.grpc_server import CHANNEL_OPTIONS
from common.interceptors import token_metadata
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc
from router.front.fleet import Worker

RESTART_TIMEOUT_S = 60.0
STOPPED, DEAD = "stopped", "dead"


class AgentLink:
    """A channel to the agent of one start of one worker."""

    def __init__(self, worker: Worker, term: int, token: str) -> None:
        self.worker = worker
        self._term = term
        self._metadata = token_metadata(token)
        self._channel = grpc.aio.insecure_channel(worker.address, options=CHANNEL_OPTIONS)
        self._stub: fleet_pb2_grpc.ExpertWorkerServiceAsyncStub = fleet_pb2_grpc.ExpertWorkerServiceStub(
            self._channel
        )

    async def heartbeat(self, timeout_s: float) -> pb.HeartbeatResponse:
        """Ask what the executor is doing.

        Raises:
            ControlError: no answer in time, or a refusal.
        """
        request = pb.HeartbeatRequest(term=self._term, incarnation=self.worker.incarnation)
        try:
            return await self._stub.Heartbeat(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error("Heartbeat", error) from None

    async def prepare(self, request: pb.PrepareEpochRequest) -> AsyncIterator[pb.PrepareEpochResponse]:
        """Prepare an epoch; ends after `linked`. Heartbeats find out whether the worker is still there.

        Raises:
            ControlError: the worker is gone or refused.
        """
        call = self._stub.PrepareEpoch(request, metadata=self._metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._error("PrepareEpoch", error) from None
        finally:
            call.cancel()

    async def restart_executor(self, reason: str) -> None:
        """Ask for a new executor; the agent then registers again.

        Raises:
            ControlError: the agent is gone or refused.
        """
        request = pb.RestartExecutorRequest(
            term=self._term, incarnation=self.worker.incarnation, reason=reason
        )
        try:
            await self._stub.RestartExecutor(request, timeout=RESTART_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error("RestartExecutor", error) from None

    async def close(self) -> None:
        """Drop the channel."""
        await self._channel.close()

    def _error(self, call: str, error: grpc.aio.AioRpcError) -> ControlError:
        return ControlError(
            f"{call} on expert worker {self.worker.worker_id} at {self.worker.address} failed with "
            f"{error.code().name}: {error.details()}"
        )
