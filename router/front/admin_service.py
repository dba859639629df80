"""AdminService: what an operator sees, and the configuration that an operator changes."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError, RequestError
from common.json_file import parse_json, shown
from protos import admin_pb2 as pb
from protos import admin_pb2_grpc
from router.front.config_history import ConfigHistory
from router.front.config_in_force import ConfigInForce
from router.front.load_inquiry import LoadInquiry
from router.front.reload import Outcome, Proposal, Reload
from router.front.service_state import ServiceState

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

LEAST_INTERVAL_S = 0.1
LONGEST_INTERVAL_S = 3600.0


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Shows the configuration and the state, and changes the configuration."""

    def __init__(
        self,
        in_force: ConfigInForce,
        history: ConfigHistory,
        reload: Reload,
        state: ServiceState,
        snapshot: Callable[[], pb.GetStatusResponse],
        loads: LoadInquiry,
    ) -> None:
        self._in_force = in_force
        self._history = history
        self._reload = reload
        self._state = state
        self._snapshot = snapshot
        self._loads = loads

    async def GetConfig(self, request: pb.GetConfigRequest, context: Context) -> pb.GetConfigResponse:
        """Show the document in force, and the values in effect."""
        effective, version = self._in_force.effective, self._in_force.version
        return pb.GetConfigResponse(
            config_json=json.dumps(effective.document, indent=2, ensure_ascii=False),
            version=version.number,
            effective_json=effective.config.model_dump_json(indent=2),
            content_hash=version.content_hash,
            state_dir=self._history.directory,
        )

    async def ReloadConfig(
        self, request: pb.ReloadConfigRequest, context: Context
    ) -> pb.ReloadConfigResponse:
        """Put another document in force, or say what would come of it."""
        proposal = Proposal(
            document=_document(request.config_json),
            author=context.peer(),
            origin="reload",
            expected_version=request.expected_version if request.HasField("expected_version") else None,
            is_dry_run=request.dry_run,
        )
        outcome = await self._reload.apply(proposal)
        return pb.ReloadConfigResponse(
            version=outcome.version,
            applied=outcome.is_applied,
            changes=_changes(outcome),
            warnings=outcome.warnings,
            refusals=outcome.refusals,
        )

    async def ListConfigVersions(
        self, request: pb.ListConfigVersionsRequest, context: Context
    ) -> pb.ListConfigVersionsResponse:
        """List what is kept, newest first."""
        in_force = self._in_force.version.number
        return pb.ListConfigVersionsResponse(
            versions=[
                pb.ConfigVersion(
                    version=version.number,
                    in_force=version.number == in_force,
                    content_hash=version.content_hash,
                    author=version.author,
                    origin=version.origin,
                    created_s=version.created_s,
                )
                for version in reversed(self._history.versions)
            ]
        )

    async def RollbackConfig(
        self, request: pb.RollbackConfigRequest, context: Context
    ) -> pb.RollbackConfigResponse:
        """Put an earlier document in force again."""
        expected = request.expected_version if request.HasField("expected_version") else None
        outcome = await self._reload.roll_back(request.version, context.peer(), expected)
        return pb.RollbackConfigResponse(
            version=outcome.version,
            applied=outcome.is_applied,
            changes=_changes(outcome),
            warnings=outcome.warnings,
        )

    async def GetExpertLoad(
        self, request: pb.GetExpertLoadRequest, context: Context
    ) -> pb.GetExpertLoadResponse:
        """Show how often each expert was chosen."""
        loads = await self._loads.ask()
        return pb.GetExpertLoadResponse(
            layers=[
                pb.LayerLoad(layer_id=layer_id, tokens=tokens)
                for layer_id, tokens in loads.layers
                if isinstance(layer_id, int) and isinstance(tokens, list)
            ]
        )

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


def _document(text: str) -> dict[str, Any]:
    try:
        document = parse_json(text, "config_json")
    except ConfigError as error:
        raise RequestError("config_json", str(error)) from None
    if not isinstance(document, dict):
        raise RequestError(
            "config_json", f"config_json holds {shown(document)}, but it must be a JSON object"
        )
    return document


def _changes(outcome: Outcome) -> list[pb.ConfigChange]:
    return [
        pb.ConfigChange(
            path=change.path,
            old_json=change.old_json,
            new_json=change.new_json,
            reload_class=change.reload.name,
        )
        for change in outcome.changes
    ]
