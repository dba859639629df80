"""Finds out which members of a fleet reach each other on the data plane, before rows depend on it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from common.errors import LinkError

TOKEN_BYTES = 16
MAX_GREETING_BYTES = 64


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a member waits to be reached, and what it answers: another service does not know the token."""

    host: str
    port: int
    token: str


@contextlib.asynccontextmanager
async def listening(host: str) -> AsyncIterator[Listener]:
    """Answer probes at a free port of `host`, and of no other address, until the block ends.

    Raises:
        LinkError: nothing can listen there.
    """
    token = secrets.token_hex(TOKEN_BYTES)

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(f"{token}\n".encode())
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    try:
        server = await asyncio.start_server(greet, host, 0)
    except OSError as error:
        raise LinkError(
            f"no probe can be answered on {host}: {error.strerror or error}; check ExpertMesh.dataAddress"
        ) from None
    try:
        yield Listener(host, int(server.sockets[0].getsockname()[1]), token)
    finally:
        server.close()


async def probe(address: str, targets: Sequence[Listener], timeout_s: float) -> list[str]:
    """Try to reach every target at once, from `address` of this machine; none takes longer than timeout_s.

    Returns:
        One per target: why it was not reached; empty where it was.
    """
    return list(await asyncio.gather(*(_failure(address, target, timeout_s) for target in targets)))


async def _failure(address: str, listener: Listener, timeout_s: float) -> str:
    """Why a listener was not reached; empty where it was."""
    place = f"{listener.host}:{listener.port}"
    try:
        async with asyncio.timeout(timeout_s):
            greeting = await _greeting(address, listener)
    except TimeoutError:
        return f"no answer from {place} within {timeout_s:.1f} s"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"{place}: {why}"
    return "" if greeting == f"{listener.token}\n".encode() else f"{place} is answered by somebody else"


async def _greeting(address: str, listener: Listener) -> bytes:
    reader, writer = await asyncio.open_connection(
        listener.host, listener.port, local_addr=(address, 0), limit=MAX_GREETING_BYTES
    )
    try:
        return await reader.readline()
    finally:
        writer.close()
