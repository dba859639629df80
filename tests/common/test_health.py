"""The health check of containers, asked of a real server, by its exit status."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from common.grpc_server import RunningServer, start_server
from common.interceptors import FleetTokenInterceptor

NAME = "readiness"


async def health(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run the check as a container does; return its exit status and what it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "common.health", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    said, _ = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, said.decode().strip()


async def listening(*interceptors: grpc.aio.ServerInterceptor) -> RunningServer:
    return await start_server("127.0.0.1", 0, lambda _server: None, (NAME,), interceptors)


@pytest.mark.asyncio
async def test_a_service_is_healthy_exactly_while_it_serves() -> None:
    server = await listening()
    try:
        assert await health(server.address, NAME) == (1, "NOT_SERVING")
        await server.set_serving(True)
        assert await health(server.address, NAME) == (0, "SERVING")
        assert await health(server.address) == (0, "SERVING")
        assert await health(f"interface:lo:{server.port}", NAME) == (0, "SERVING")
    finally:
        await server.stop(0)
    status, said = await health(server.address, NAME)
    assert status == 1
    assert said.startswith("UNAVAILABLE: ")


@pytest.mark.asyncio
async def test_a_name_that_the_service_does_not_have_is_unhealthy() -> None:
    server = await listening()
    try:
        status, said = await health(server.address, "nobody")
    finally:
        await server.stop(0)
    assert status == 1
    assert said.startswith("NOT_FOUND")


@pytest.mark.asyncio
async def test_ports_of_the_fleet_answer_to_its_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("the-secret\n")
    server = await listening(FleetTokenInterceptor("the-secret"))
    try:
        await server.set_serving(True)
        file = {"EXPERTMESH_FLEET_TOKEN_FILE": str(tmp_path / "token")}
        assert await health(server.address, "--fleet-token", **file) == (0, "SERVING")
        status, said = await health(server.address, **file)
        assert (status, said.partition(":")[0]) == (1, "UNAUTHENTICATED")
    finally:
        await server.stop(0)
    status, said = await health(server.address, "--fleet-token", EXPERTMESH_FLEET_TOKEN="")
    assert status == 2
    assert "there is no fleet token" in said


@pytest.mark.asyncio
async def test_an_address_without_a_port_is_a_mistake_of_the_caller() -> None:
    assert await health("127.0.0.1") == (2, '"127.0.0.1" is no address of a service: write HOST:PORT')
