"""Links through shared memory: what is sent arrives, memory is bounded, and nothing foreign is used."""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from common.errors import LinkError
from common.shared_memory_link import SharedMemoryLink
from common.shared_segments import LEAST_BYTES, MOST_FREE_BYTES

LARGE = 1 << 40
Sockets = tuple[socket.socket, socket.socket]
Links = tuple[SharedMemoryLink, SharedMemoryLink]
Echo = tuple[SharedMemoryLink, "subprocess.Popen[bytes]"]
ECHO = """
import socket, sys
from common.shared_memory_link import SharedMemoryLink
from tests.common.test_shared_memory_link import message_of, wait
link = SharedMemoryLink(socket.socket(fileno=int(sys.argv[1])), "")
link.expect(1 << 40)
while True:
    given = wait(link)
    answer = link.message(given.numel())[: given.numel()]
    answer.copy_(given)
    answer += 1
    link.done(given)
    link.post(answer)
"""


def message_of(length: int) -> Tensor:
    """Bytes that differ from place to place and from length to length."""
    return (torch.arange(length) * 7 + length).to(torch.uint8)


def post(link: SharedMemoryLink, content: Tensor) -> None:
    memory = link.message(content.numel())[: content.numel()]
    memory.copy_(content)
    link.post(memory)


def wait(link: SharedMemoryLink, timeout_s: float = 30.0) -> Tensor:
    """The next message."""
    end = time.monotonic() + timeout_s
    while (found := link.receive()) is None:
        ready = select.select([link.readable], [link.readable] if link.is_backlogged else [], [], timeout_s)
        assert any(ready), "nothing came"
        assert time.monotonic() < end, "nothing came"
    return found


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for end in pair:
        end.close()


@pytest.fixture
def links(
    sockets: Sockets,
) -> Iterator[tuple[SharedMemoryLink, SharedMemoryLink]]:
    pair = tuple(SharedMemoryLink(end, "sharedMemory") for end in sockets)
    for link in pair:
        link.expect(LARGE)
    yield pair[0], pair[1]
    for link in pair:
        link.close()


@pytest.fixture
def echo(
    sockets: Sockets,
) -> Iterator[Echo]:
    ours, theirs = sockets
    process = subprocess.Popen([sys.executable, "-c", ECHO, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    link = SharedMemoryLink(ours, "sharedMemory")
    link.expect(LARGE)
    yield link, process
    process.kill()
    process.wait()
    link.close()


def test_messages_of_every_size_come_back_from_another_process(
    echo: Echo,
) -> None:
    link, _ = echo
    sizes = [1, 184, 4095, 4097, LEAST_BYTES, LEAST_BYTES + 1, 500_000, 1, 20_000_000, 3]
    for size in sizes * 2:
        post(link, message_of(size))
        found = wait(link)
        assert torch.equal(found, message_of(size) + 1)
        link.done(found)


def test_memory_is_used_again_and_again(links: Links) -> None:
    router, worker = links
    addresses = set()
    for number in range(500):
        post(router, message_of(20_000))
        given = wait(worker)
        addresses.add(given.data_ptr())
        worker.done(given)
        if number % 3 == 0:  # memory also comes home without an answer that takes it along
            post(worker, message_of(3))
            router.done(wait(router))
        router.receive()
    assert len(addresses) <= 16


def test_memory_made_in_inference_mode_may_be_written_outside_of_it(links: Links) -> None:
    router, worker = links
    with torch.inference_mode():
        post(router, message_of(10))
        worker.done(wait(worker))
        post(worker, message_of(10))
        router.done(wait(router))  # the router's memory is home
    post(router, message_of(11))
    assert torch.equal(wait(worker), message_of(11))


def test_large_messages_leave_no_more_than_the_bound_behind(
    links: Links,
) -> None:
    router, worker = links

    def mapped() -> int:
        gc.collect()
        maps = psutil.Process().memory_maps(grouped=False)
        return sum(one.rss for one in maps if "memfd:expertmesh" in one.path)

    before = mapped()
    for _ in range(3):
        for _ in range(4):
            post(router, torch.ones(30_000_000, dtype=torch.uint8))
        for _ in range(4):
            worker.done(wait(worker))
        post(worker, message_of(1))
        router.done(wait(router))
        post(router, message_of(1))  # tells which segments are no more
        worker.done(wait(worker))
    # Both ends are in this process: every page counts twice.
    assert mapped() - before <= 2 * MOST_FREE_BYTES


def test_nobody_blocks_while_thousands_of_messages_wait(
    links: Links,
) -> None:
    router, worker = links
    for number in range(2000):
        post(router, torch.tensor([number % 251, number // 251], dtype=torch.uint8))
    assert router.is_backlogged
    for number in range(2000):
        found = worker.receive()
        if found is None:
            router.receive()  # takes what the socket had no room for
            found = worker.receive()
        assert found is not None
        assert found.tolist() == [number % 251, number // 251]
        worker.done(found)
    assert not router.is_backlogged


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_peer_is_noticed_at_once(echo: Echo, fault: signal.Signals) -> None:
    link, process = echo
    post(link, message_of(10))
    link.done(wait(link))
    process.send_signal(fault)
    assert select.select([link.readable], [], [], 10.0)[0], "the end of the process was not seen"
    with pytest.raises(LinkError, match="gone"):
        link.receive()
    with pytest.raises(LinkError):
        post(link, message_of(10))


def test_nothing_is_left_behind_in_the_file_system_or_in_the_process(
    sockets: Sockets,
) -> None:
    shared = Path("/dev/shm")
    before = sorted(shared.iterdir()) if shared.exists() else []
    open_fds = psutil.Process().num_fds()
    pair = [SharedMemoryLink(end, "sharedMemory") for end in sockets]
    pair[1].expect(LARGE)
    for _ in range(20):
        post(pair[0], message_of(100_000))
        wait(pair[1])
    post(pair[0], message_of(200_000))  # under way when the link ends
    for link in pair:
        link.close()
    gc.collect()
    assert psutil.Process().num_fds() == open_fds - 2  # the two sockets
    assert (sorted(shared.iterdir()) if shared.exists() else []) == before
    with pytest.raises(LinkError):
        pair[0].message(1)


def test_a_message_longer_than_was_expected_is_refused(
    sockets: Sockets,
) -> None:
    router, worker = (SharedMemoryLink(end, "sharedMemory") for end in sockets)
    worker.expect(100)
    post(router, message_of(101))
    with pytest.raises(LinkError, match="101 bytes"):
        wait(worker)
    router.close()
    worker.close()


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("foreign", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.mark.parametrize(
    ("datagram", "size", "seals", "said"),
    [
        (struct.pack("=QQIHH", 0, 10, 1, 0, 0), 4096, 0, "not sealed"),
        (struct.pack("=QQIHH", 0, 4097, 1, 0, 0), 4096, ALL_SEALS, "do not exist"),
        (struct.pack("=QQIHH", 0, 10, 1, 0, 0), None, 0, "do not exist"),
        (struct.pack("=QQIHHI", 0, 0, 0, 1, 0, 7), None, 0, "segment 7"),
        (struct.pack("=QQIHH", 0, 0, 0, 1, 0), None, 0, "not of this protocol"),
        (struct.pack("=QQIHH", 0, 0, 0, 0, 0), 4096, ALL_SEALS, "not of this protocol"),
        (b"hello", None, 0, "not of this protocol"),
        (bytes(70000), None, 0, "longer"),
    ],
)
def test_what_is_not_of_the_protocol_ends_the_link(
    sockets: Sockets,
    datagram: bytes,
    size: int | None,
    seals: int,
    said: str,
) -> None:
    stranger, ours = sockets
    link = SharedMemoryLink(ours, "sharedMemory")
    link.expect(LARGE)
    before = psutil.Process().num_fds()
    fds = [] if size is None else [memfd(size, seals)]
    socket.send_fds(stranger, [datagram], fds)
    for fd in fds:
        os.close(fd)
    with pytest.raises(LinkError, match=said):
        link.receive()
    assert psutil.Process().num_fds() == before
    link.close()
