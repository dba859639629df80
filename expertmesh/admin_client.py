"""The client of the admin port: state and configuration of a router and its fleet. Without torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from expertmesh.call_errors import error_from
from expertmesh.client import CALL_TIMEOUT_S, CHANNEL_OPTIONS
from protos import admin_pb2, admin_pb2_grpc

RELOAD_TIMEOUT_S = 90.0
"""Longer than the router waits for its engine and its expert workers, one after the other."""


class AdminClient:
    """Talks to the admin port of a router. Every method raises an error of common.errors."""

    def __init__(self, target: str) -> None:
        """`target` is the admin HOST:PORT."""
        self.target = target
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def status(self) -> admin_pb2.GetStatusResponse:
        """One snapshot."""
        try:
            return await self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error

    async def watch(self, interval_s: float = 1.0) -> AsyncIterator[admin_pb2.GetStatusResponse]:
        """Snapshots, whenever something changed and at least every `interval_s`."""
        call = self._stub.WatchStatus(admin_pb2.WatchStatusRequest(interval_s=interval_s))
        try:
            async for response in call:
                yield response.status
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error
        finally:
            call.cancel()

    async def expert_load(self) -> admin_pb2.GetExpertLoadResponse:
        """How often each expert was chosen since the router's engine started."""
        try:
            return await self._stub.GetExpertLoad(admin_pb2.GetExpertLoadRequest(), timeout=RELOAD_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error

    async def config(self) -> admin_pb2.GetConfigResponse:
        """The configuration in force."""
        try:
            return await self._stub.GetConfig(admin_pb2.GetConfigRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error

    async def reload(
        self, config_json: str, *, dry_run: bool = False, expected_version: int | None = None
    ) -> admin_pb2.ReloadConfigResponse:
        """Put another document in force, or say what would come of it.

        Raises:
            RequestError: a value in it is wrong; `field` is its JSON path.
            ReloadRefused: keys differ that cannot change while the services run.
            VersionConflict: another version is in force than was expected.
        """
        request = admin_pb2.ReloadConfigRequest(
            config_json=config_json, dry_run=dry_run, expected_version=expected_version
        )
        try:
            return await self._stub.ReloadConfig(request, timeout=RELOAD_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error

    async def versions(self) -> list[admin_pb2.ConfigVersion]:
        """The versions of the configuration that are kept, newest first."""
        request = admin_pb2.ListConfigVersionsRequest()
        try:
            return list((await self._stub.ListConfigVersions(request, timeout=CALL_TIMEOUT_S)).versions)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error

    async def roll_back(
        self, version: int, *, expected_version: int | None = None
    ) -> admin_pb2.RollbackConfigResponse:
        """Put the document of an earlier version in force again, as a new version.

        Raises:
            VersionUnknown: it is not kept.
            ExpertMeshError: as for `reload`.
        """
        request = admin_pb2.RollbackConfigRequest(version=version, expected_version=expected_version)
        try:
            return await self._stub.RollbackConfig(request, timeout=RELOAD_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error
