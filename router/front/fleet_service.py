"""FleetService: where expert workers introduce themselves."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc
from router.front.epochs import Epochs
from router.front.fleet import Fleet
from router.front.heartbeats import INTERVAL_S, Heartbeats
from router.front.service_state import ServiceState

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """Takes in expert workers."""

    def __init__(
        self, term: int, fleet: Fleet, heartbeats: Heartbeats, epochs: Epochs, state: ServiceState
    ) -> None:
        self._term = term
        self._fleet = fleet
        self._heartbeats = heartbeats
        self._epochs = epochs
        self._state = state

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        """Make a worker known; a new start of a known worker ends the epoch its earlier start was in."""
        earlier = self._fleet.workers.get(request.worker_id)
        worker, is_new = self._fleet.register(request)
        if is_new:
            if earlier is not None and self._epochs.is_member(earlier):
                self._epochs.worker_lost(earlier, "it started anew")
            logger.info(
                "expert worker %s registered: address %s, device %s, incarnation %d",
                worker.worker_id,
                worker.address,
                worker.device,
                worker.incarnation,
            )
            self._heartbeats.watch(worker)
            self._epochs.wake_at_once()
        self._epochs.wake()
        self._state.announce()
        return pb.RegisterResponse(term=self._term, heartbeat_interval_s=INTERVAL_S)
