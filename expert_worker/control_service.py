"""ExpertWorkerService: what a router asks of a worker. Torch-free."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError, ConfigError, ControlError
from common.link_probe import Listener, listening, probe
from common.lldp import device_links
from common.topology import Link
from expert_worker.executor_link import ExecutorLink
from expert_worker.messages import Linked, Loaded, Loading, Prepare, PrepareFailed, Refused
from expert_worker.registration import Registration
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

RESTART_TIMEOUT_S = 45.0
MOST_PROBE_S = 60.0
"""How long a router can have this worker look around, or be reached."""
KINDS = {
    Link.SWITCH: pb.DEVICE_LINK_KIND_SWITCH,
    Link.DIRECT: pb.DEVICE_LINK_KIND_DIRECT,
    Link.UNKNOWN: pb.DEVICE_LINK_KIND_UNKNOWN,
}
FINAL_KINDS = {error.__name__: error for error in (CheckpointError, ConfigError)}
"""What preparing the same epoch again would meet again."""


class ControlService(fleet_pb2_grpc.ExpertWorkerServiceServicer):
    """Obeys the router it has registered with, and nobody else."""

    def __init__(
        self,
        executor: ExecutorLink,
        registration: Registration,
        model_path: Path | None,
        data_address: str,
        on_useless: Callable[[CheckpointError | ConfigError], None],
    ) -> None:
        """Serve.

        Args:
            executor: what does the work.
            registration: knows the router.
            model_path: where this worker finds the checkpoint, if not where the router says.
            data_address: this worker's address on the data plane.
            on_useless: called when this worker can never hold what it was asked to.
        """
        self._executor = executor
        self._registration = registration
        self._model_path = model_path
        self._data_address = data_address
        self._on_useless = on_useless

    async def PrepareEpoch(
        self, request: pb.PrepareEpochRequest, context: Context
    ) -> AsyncIterator[pb.PrepareEpochResponse]:
        """Load what the epoch needs, join its link, and tell how far it is."""
        await self._check(request.term, request.incarnation)
        logger.info("epoch %d: preparing ep_rank %d of %d", request.epoch, request.ep_rank, request.ep_size)
        async for answer in self._executor.prepare(self._prepare(request)):
            match answer:
                case Loading():
                    progress = pb.LoadProgress(
                        loaded_bytes=answer.loaded_bytes, total_bytes=answer.total_bytes
                    )
                    yield pb.PrepareEpochResponse(loading=progress)
                case Loaded():
                    yield pb.PrepareEpochResponse(loaded=pb.Loaded(loaded_bytes=answer.loaded_bytes))
                case Linked():
                    yield pb.PrepareEpochResponse(linked=pb.Linked())
                case Refused():
                    yield pb.PrepareEpochResponse(refused=pb.Refused(reason=answer.reason))
                case PrepareFailed():
                    raise self._failed(answer)

    async def CheckEpoch(self, request: pb.CheckEpochRequest, context: Context) -> pb.CheckEpochResponse:
        """Ask the executor whether it could take part in an epoch."""
        await self._check(request.term, request.incarnation)
        refusal = await self._executor.check(request.term, request.buffer_bytes, request.ep_level)
        return pb.CheckEpochResponse(refusal=refusal)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        """Tell what the executor is doing."""
        await self._check(request.term, request.incarnation)
        executor = self._executor
        return pb.HeartbeatResponse(
            executor_state=executor.state,
            progress=executor.progress,
            cpu_time_ns=executor.cpu_time_ns,
            loaded_bytes=executor.loaded_bytes,
            grouped_matmul=executor.grouped_matmul,
        )

    async def RestartExecutor(
        self, request: pb.RestartExecutorRequest, context: Context
    ) -> pb.RestartExecutorResponse:
        """Replace the executor."""
        await self._check(request.term, request.incarnation)
        logger.warning("the router asks for a new executor: %s", request.reason)
        return pb.RestartExecutorResponse(incarnation=await self._executor.restart(RESTART_TIMEOUT_S))

    async def GetDeviceLink(
        self, request: pb.GetDeviceLinkRequest, context: Context
    ) -> pb.GetDeviceLinkResponse:
        """Ask hccn_tool what the cable of an NPU leads to."""
        await self._check(request.term, request.incarnation)
        timeout_s = min(request.timeout_s, MOST_PROBE_S)
        (found,) = await device_links(self._data_address, [request.device_id], timeout_s)
        return pb.GetDeviceLinkResponse(kind=KINDS[found.link], reason=found.reason)

    async def AnswerProbes(
        self, request: pb.AnswerProbesRequest, context: Context
    ) -> AsyncIterator[pb.AnswerProbesResponse]:
        """Listen on the data plane until the router ends the call."""
        await self._check(request.term, request.incarnation)
        async with listening(self._data_address) as listener:
            address = pb.ProbeAddress(host=listener.host, port=listener.port, token=listener.token)
            yield pb.AnswerProbesResponse(address=address)
            # A router that dies ends the call too; one that forgets it must not keep the port open.
            await asyncio.sleep(MOST_PROBE_S)

    async def ProbePeers(self, request: pb.ProbePeersRequest, context: Context) -> pb.ProbePeersResponse:
        """Try to reach others on the data plane."""
        await self._check(request.term, request.incarnation)
        targets = [Listener(one.host, one.port, one.token) for one in request.targets]
        failures = await probe(self._data_address, targets, min(request.timeout_s, MOST_PROBE_S))
        return pb.ProbePeersResponse(failures=failures)

    async def _check(self, term: int, incarnation: int) -> None:
        if not await self._registration.is_of(term):
            raise ControlError(
                f"term {term} called, but this worker has registered with term {self._registration.term}"
            )
        if incarnation != self._executor.incarnation:
            raise ControlError(
                f"incarnation {incarnation} was meant, but this worker is {self._executor.incarnation} now"
            )
        self._registration.heard()

    def _prepare(self, request: pb.PrepareEpochRequest) -> Prepare:
        link = request.link
        return Prepare(
            term=request.term,
            epoch=request.epoch,
            incarnation=request.incarnation,
            ep_rank=request.ep_rank,
            ep_size=request.ep_size,
            model_path=str(self._model_path or request.model_path),
            dtype=request.dtype,
            layers=[[layer.layer_id, list(layer.expert_ids)] for layer in request.layers],
            int8_layers=list(request.int8_layers),
            exchange=link.exchange,
            host=link.host,
            port=link.port,
            prefix=link.prefix,
            timeout_s=link.timeout_s,
            buffer_bytes=request.buffer_bytes,
            ep_level=request.ep_level,
        )

    def _failed(self, answer: PrepareFailed) -> ControlError:
        if kind := FINAL_KINDS.get(answer.kind):
            # After this call has told the router why.
            asyncio.get_running_loop().call_soon(self._on_useless, kind(answer.message))
        return ControlError(answer.message)
