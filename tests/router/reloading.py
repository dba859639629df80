"""What an operator does over real gRPC, for tests of the reload."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest

from protos import admin_pb2 as pb
from tests.router.front_fleet import Running


async def document_of(running: Running) -> dict[str, Any]:
    config = await running.admin.GetConfig(pb.GetConfigRequest(), timeout=5)
    document = json.loads(config.config_json)
    assert isinstance(document, dict)
    return document


async def reload(
    running: Running, document: Any, dry_run: bool = False, expected_version: int | None = None
) -> pb.ReloadConfigResponse:
    text = document if isinstance(document, str) else json.dumps(document)
    request = pb.ReloadConfigRequest(config_json=text, dry_run=dry_run, expected_version=expected_version)
    return await running.admin.ReloadConfig(request, timeout=20)


async def with_own(running: Running, **own: Any) -> dict[str, Any]:
    """The document in force with other values in section ExpertMesh."""
    document = await document_of(running)
    document["ExpertMesh"] |= own
    return document


async def with_level(running: Running, ep_level: int, **own: Any) -> dict[str, Any]:
    document = await with_own(running, **own)
    model = document["ModelDeployConfig"]["ModelConfig"][0]
    model["models"] = {"deepseekv2": {"ep_level": ep_level}}
    return document


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def tuning(running: Running, expected: int) -> None:
    """The engine runs steps as 100 * ep_level + micro_batches says."""
    await running.until(lambda status: status.num_steps == expected)
