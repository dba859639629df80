"""The router's calls to one expert worker's agent. Every call has a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc

from common.errors import ControlError
from common.grpc_server import CHANNEL_OPTIONS
from common.interceptors import token_metadata
from common.link_probe import Listener
from common.topology import Link
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc
from router.front.fleet import Worker

RESTART_TIMEOUT_S = 60.0
CALL_SLACK_S = 10.0
"""How much longer a call may take than what it asks for."""
KINDS: dict[int, Link] = {
    pb.DEVICE_LINK_KIND_SWITCH: Link.SWITCH,
    pb.DEVICE_LINK_KIND_DIRECT: Link.DIRECT,
}
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

    async def check_epoch(self, ep_level: int, buffer_bytes: int, timeout_s: float) -> str:
        """Ask the worker's executor whether it would take part in an epoch; why not, empty where it would.

        Raises:
            ControlError: no answer in time, or the worker is another one by now.
        """
        request = pb.CheckEpochRequest(
            term=self._term,
            incarnation=self.worker.incarnation,
            buffer_bytes=buffer_bytes,
            ep_level=ep_level,
        )
        try:
            answer = await self._stub.CheckEpoch(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error("CheckEpoch", error) from None
        return answer.refusal

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

    async def device_link(self, device: int, timeout_s: float) -> tuple[Link, str]:
        """Have hccn_tool asked what a cable leads to; say how we know it.

        Raises:
            ControlError: the agent is gone or refused.
        """
        request = pb.GetDeviceLinkRequest(
            term=self._term, incarnation=self.worker.incarnation, device_id=device, timeout_s=timeout_s
        )
        try:
            answer = await self._stub.GetDeviceLink(
                request, timeout=timeout_s + CALL_SLACK_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._error("GetDeviceLink", error) from None
        return KINDS.get(answer.kind, Link.UNKNOWN), answer.reason

    @asynccontextmanager
    async def answering_probes(self) -> AsyncIterator[Listener]:
        """Have the worker answer probes on the data plane until the block ends.

        Raises:
            ControlError: the agent is gone or refused.
        """
        request = pb.AnswerProbesRequest(term=self._term, incarnation=self.worker.incarnation)
        call = self._stub.AnswerProbes(request, metadata=self._metadata)
        try:
            async with asyncio.timeout(CALL_SLACK_S):
                first = await call.read()
        except grpc.aio.AioRpcError as error:
            raise self._error("AnswerProbes", error) from None
        except TimeoutError:
            call.cancel()
            raise self._silent("AnswerProbes") from None
        try:
            if not isinstance(first, pb.AnswerProbesResponse):
                raise self._silent("AnswerProbes")
            yield Listener(first.address.host, first.address.port, first.address.token)
        finally:
            call.cancel()

    async def probe(self, targets: Sequence[Listener], timeout_s: float) -> list[str]:
        """Have the worker try to reach others; one per target: why it did not, empty where it did.

        Raises:
            ControlError: the agent is gone or refused.
        """
        request = pb.ProbePeersRequest(
            term=self._term,
            incarnation=self.worker.incarnation,
            targets=[pb.ProbeAddress(host=one.host, port=one.port, token=one.token) for one in targets],
            timeout_s=timeout_s,
        )
        try:
            answer = await self._stub.ProbePeers(
                request, timeout=timeout_s + CALL_SLACK_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._error("ProbePeers", error) from None
        if len(answer.failures) != len(targets):
            raise self._silent("ProbePeers")
        return list(answer.failures)

    async def close(self) -> None:
        """Drop the channel."""
        await self._channel.close()

    def _silent(self, call: str) -> ControlError:
        return ControlError(
            f"{call} on expert worker {self.worker.worker_id} at {self.worker.address} brought no answer"
        )

    def _error(self, call: str, error: grpc.aio.AioRpcError) -> ControlError:
        return ControlError(
            f"{call} on expert worker {self.worker.worker_id} at {self.worker.address} failed with "
            f"{error.code().name}: {error.details()}"
        )
