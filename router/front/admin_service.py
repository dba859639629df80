"""AdminService: what an operator sees."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from common.config import Config
from common.errors import RequestError
from protos import admin_pb2 as pb
from protos import admin_pb2_grpc
from router.front.service_state import ServiceState

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

LEAST_INTERVAL_S = 0.1
LONGEST_INTERVAL_S = 3600.0


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Shows the configuration and the state."""

    def __init__(
        self, config: Config, state: ServiceState, snapshot: Callable[[], pb.GetStatusResponse]
    ) -> None:
        self._config = config
        self._state = state
        self._snapshot = snapshot

    async def GetConfig(self, request: pb.GetConfigRequest, context: Context) -> pb.GetConfigResponse:
        """Show the effective configuration; it holds no secrets."""
        return pb.GetConfigResponse(config_json=self._config.model_dump_json(indent=2), version=1)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """Take one snapshot."""
        return self._snapshot()

    async def WatchStatus(
        self, request: pb.WatchStatusRequest, context: Context
    ) -> AsyncIterator[pb.WatchStatusResponse]:
        """Send a snapshot at every change, at most ten a second, and at least every interval_s."""
        interval_s = request.interval_s if request.HasField("interval_s") else 1.0
        if math.isnan(interval_s) or not LEAST_INTERVAL_S <= interval_s <= LONGEST_INTERVAL_S:
            raise RequestError(
                "interval_s",
                f"interval_s is {interval_s}, but it must be {LEAST_INTERVAL_S} to {LONGEST_INTERVAL_S:g}",
            )
        while True:
            # Begins before the snapshot: a change while it is being sent is not missed.
            change = asyncio.create_task(self._state.wait_changed(interval_s))
            try:
                yield pb.WatchStatusResponse(status=self._snapshot())
                await asyncio.sleep(LEAST_INTERVAL_S)
                await change
            finally:
                change.cancel()
