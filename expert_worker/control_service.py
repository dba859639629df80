"""ExpertWorkerService: what a router asks of a worker. Torch-free."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError, ConfigError, ControlError
from expert_worker.executor_link import ExecutorLink
from expert_worker.messages import Linked, Loaded, Loading, Prepare, PrepareFailed
from expert_worker.registration import Registration
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

RESTART_TIMEOUT_S = 45.0
FINAL_KINDS = {error.__name__: error for error in (CheckpointError, ConfigError)}
"""What preparing the same epoch again would meet again."""


class ControlService(fleet_pb2_grpc.ExpertWorkerServiceServicer):
    """Obeys the router it has registered with, and nobody else."""

    def __init__(
        self,
        executor: ExecutorLink,
        registration: Registration,
        model_path: Path | None,
        on_useless: Callable[[CheckpointError | ConfigError], None],
    ) -> None:
        """Serve.

        Args:
            executor: what does the work.
            registration: knows the router.
            model_path: where this worker finds the checkpoint, if not where the router says.
            on_useless: called when this worker can never hold what it was asked to.
        """
        self._executor = executor
        self._registration = registration
        self._model_path = model_path
        self._on_useless = on_useless

    async def PrepareEpoch(
        self, request: pb.PrepareEpochRequest, context: Context
    ) -> AsyncIterator[pb.PrepareEpochResponse]:
        """Load what the epoch needs, join its link, and tell how far it is."""
        self._check(request.term, request.incarnation)
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
                case PrepareFailed():
                    raise self._failed(answer)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        """Tell what the executor is doing."""
        self._check(request.term, request.incarnation)
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
        self._check(request.term, request.incarnation)
        logger.warning("the router asks for a new executor: %s", request.reason)
        return pb.RestartExecutorResponse(incarnation=await self._executor.restart(RESTART_TIMEOUT_S))

    def _check(self, term: int, incarnation: int) -> None:
        if term != self._registration.term:
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
        )

    def _failed(self, answer: PrepareFailed) -> ControlError:
        if kind := FINAL_KINDS.get(answer.kind):
            # After this call has told the router why.
            asyncio.get_running_loop().call_soon(self._on_useless, kind(answer.message))
        return ControlError(answer.message)
