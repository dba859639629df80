"""Which members reach each other: over real sockets, with peers that are absent, silent or somebody else."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from common.errors import LinkError
from common.link_probe import Listener, listening, probe

HERE = "127.0.0.1"


@pytest.mark.asyncio
async def test_a_member_that_listens_is_reached() -> None:
    async with listening(HERE) as first, listening("127.0.0.2") as second:
        assert await probe(HERE, [first, second], 30.0) == ["", ""]


@pytest.mark.asyncio
async def test_the_probe_leaves_from_the_address_of_the_data_plane() -> None:
    seen: list[str] = []

    async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("peername")[0])
        writer.write(b"token\n")
        writer.close()

    async with await asyncio.start_server(note, HERE, 0) as server:
        port = server.sockets[0].getsockname()[1]
        (failure,) = await probe("127.0.0.3", [Listener(HERE, port, "token")], 30.0)
    assert failure == ""
    assert seen == ["127.0.0.3"]


@pytest.mark.asyncio
async def test_a_member_that_does_not_listen_is_named_with_its_address() -> None:
    async with listening(HERE) as gone:
        pass
    (failure,) = await probe(HERE, [gone], 30.0)
    assert failure.startswith(f"{HERE}:{gone.port}: ")


@pytest.mark.asyncio
async def test_a_peer_that_says_nothing_is_given_up_at_the_deadline() -> None:
    with socket.socket() as silent:
        silent.bind((HERE, 0))
        silent.listen()
        port = silent.getsockname()[1]
        start = time.monotonic()
        targets = [Listener(HERE, port, "token")] * 8
        failures = await probe(HERE, targets, 0.5)
        assert time.monotonic() - start < 0.5 * 8
    assert set(failures) == {f"no answer from {HERE}:{port} within 0.5 s"}


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9\n", b"", b"x" * 10_000])
@pytest.mark.asyncio
async def test_a_service_of_somebody_else_is_not_taken_for_the_member(greeting: bytes) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async with await asyncio.start_server(greet, HERE, 0) as server:
        port = server.sockets[0].getsockname()[1]
        (failure,) = await probe(HERE, [Listener(HERE, port, "token")], 30.0)
    assert failure.startswith(f"{HERE}:{port}")


@pytest.mark.asyncio
async def test_a_listener_takes_no_connection_at_another_address() -> None:
    async with listening("127.0.0.2") as listener:
        elsewhere = Listener(HERE, listener.port, listener.token)
        (failure,) = await probe(HERE, [elsewhere], 30.0)
    assert failure != ""


@pytest.mark.asyncio
async def test_an_address_of_no_interface_here_is_refused_by_name() -> None:
    with pytest.raises(LinkError, match=r"192\.0\.2\.1.*check ExpertMesh\.dataAddress"):
        async with listening("192.0.2.1"):
            pass
    async with listening(HERE) as listener:
        (failure,) = await probe("192.0.2.1", [listener], 30.0)
    assert failure != ""
