"""Which members reach each other: over real sockets, with peers that are absent, silent or somebody else."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from common.errors import LinkError
from common.link_probe import Listener, listening, probe
from common.topology import Member, ProbeResult

HERE = "127.0.0.1"
SOURCE = Member("router", "a", is_router=True)
TARGET = Member("ep_rank 0", "b")


@pytest.mark.asyncio
async def test_a_member_that_listens_is_reached() -> None:
    async with listening(HERE) as first, listening("127.0.0.2") as second:
        other = Member("ep_rank 1", "b")
        results = await probe(SOURCE, HERE, [(TARGET, first), (other, second)], 30.0)
    assert results == [ProbeResult(SOURCE, TARGET), ProbeResult(SOURCE, other)]


@pytest.mark.asyncio
async def test_the_probe_leaves_from_the_address_of_the_data_plane() -> None:
    seen: list[str] = []

    async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("peername")[0])
        writer.write(b"token\n")
        writer.close()

    async with await asyncio.start_server(note, HERE, 0) as server:
        port = server.sockets[0].getsockname()[1]
        (result,) = await probe(SOURCE, "127.0.0.3", [(TARGET, Listener(HERE, port, "token"))], 30.0)
    assert result.failure == ""
    assert seen == ["127.0.0.3"]


@pytest.mark.asyncio
async def test_a_member_that_does_not_listen_is_named_with_its_address() -> None:
    async with listening(HERE) as gone:
        pass
    (result,) = await probe(SOURCE, HERE, [(TARGET, gone)], 30.0)
    assert result.target is TARGET
    assert result.failure.startswith(f"{HERE}:{gone.port}: ")


@pytest.mark.asyncio
async def test_a_peer_that_says_nothing_is_given_up_at_the_deadline() -> None:
    with socket.socket() as silent:
        silent.bind((HERE, 0))
        silent.listen()
        port = silent.getsockname()[1]
        start = time.monotonic()
        targets = [(TARGET, Listener(HERE, port, "token"))] * 8
        results = await probe(SOURCE, HERE, targets, 0.5)
        assert time.monotonic() - start < 0.5 * 8
    assert {result.failure for result in results} == {f"no answer from {HERE}:{port} within 0.5 s"}


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9\n", b"", b"x" * 10_000])
@pytest.mark.asyncio
async def test_a_service_of_somebody_else_is_not_taken_for_the_member(greeting: bytes) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async with await asyncio.start_server(greet, HERE, 0) as server:
        port = server.sockets[0].getsockname()[1]
        (result,) = await probe(SOURCE, HERE, [(TARGET, Listener(HERE, port, "token"))], 30.0)
    assert result.failure.startswith(f"{HERE}:{port}")


@pytest.mark.asyncio
async def test_a_listener_takes_no_connection_at_another_address() -> None:
    async with listening("127.0.0.2") as listener:
        elsewhere = Listener(HERE, listener.port, listener.token)
        (result,) = await probe(SOURCE, HERE, [(TARGET, elsewhere)], 30.0)
    assert result.failure != ""


@pytest.mark.asyncio
async def test_an_address_of_no_interface_here_is_refused_by_name() -> None:
    with pytest.raises(LinkError, match=r"192\.0\.2\.1.*check ExpertMesh\.dataAddress"):
        async with listening("192.0.2.1"):
            pass
    async with listening(HERE) as listener:
        (result,) = await probe(SOURCE, "192.0.2.1", [(TARGET, listener)], 30.0)
    assert result.failure != ""
