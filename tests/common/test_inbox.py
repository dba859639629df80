"""The inbox of an exchange: it wakes for everything that may come, and sleeps in between."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from torch import Tensor

from common.errors import LinkError
from common.exchange.inbox import REPLY_SPIN_NS, Inbox
from common.shared_memory_link import SharedMemoryLink

Item = tuple[str, Tensor | LinkError | None]


@pytest.fixture(params=[0, REPLY_SPIN_NS], ids=["sleeps at once", "looks first"])
def inbox(request: pytest.FixtureRequest) -> Iterator[Inbox[Item]]:
    made: Inbox[Item] = Inbox(request.param)
    yield made
    made.close()


@pytest.fixture
def links() -> Iterator[tuple[SharedMemoryLink, SharedMemoryLink]]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = (SharedMemoryLink(end, "sharedMemory") for end in pair)
    ours.expect(1000)
    yield ours, theirs
    ours.close()
    theirs.close()


def opened(message: Tensor | LinkError, received_ns: int) -> Item:
    return "link", message


def after(delay_s: float, work: object) -> threading.Timer:
    timer = threading.Timer(delay_s, work)  # type: ignore[arg-type]
    timer.start()
    return timer


def test_a_sleeping_taker_wakes_for_messages_items_and_the_end_of_a_link(
    inbox: Inbox[Item], links: tuple[SharedMemoryLink, SharedMemoryLink]
) -> None:
    ours, theirs = links
    inbox.watch(ours, opened)

    def post() -> None:
        theirs.post(theirs.message(10)[:10])

    for work, name in ((post, "link"), (lambda: inbox.put(("put", None)), "put"), (theirs.close, "link")):
        timer = after(0.05, work)
        item = inbox.take(30.0)
        timer.join()
        assert item is not None
        assert item[0] == name
        last = item[1]
    assert isinstance(last, LinkError)


def test_a_link_that_is_added_later_wakes_the_taker_too(
    inbox: Inbox[Item], links: tuple[SharedMemoryLink, SharedMemoryLink]
) -> None:
    ours, theirs = links
    theirs.post(theirs.message(10)[:10])
    timer = after(0.05, lambda: inbox.watch(ours, opened))
    assert inbox.take(30.0) is not None
    timer.join()


def test_what_is_put_back_comes_first_and_what_is_not_wanted_never(inbox: Inbox[Item]) -> None:
    for name in ("first", "second", "third"):
        inbox.put((name, None))
    first = inbox.take(0.0)
    assert first == ("first", None)
    inbox.put_back(first)
    assert inbox.take(0.0, lambda item: item[0] != "second") == ("first", None)
    assert inbox.take(0.0, lambda item: item[0] != "second") == ("third", None)
    assert inbox.take(0.0) is None


def test_closing_wakes_the_taker_now_and_from_then_on(inbox: Inbox[Item]) -> None:
    timer = after(0.05, inbox.close)
    assert inbox.take(None) is None
    timer.join()
    assert inbox.take(None) is None
    inbox.put(("late", None))


def test_waiting_takes_no_processor_time(
    inbox: Inbox[Item], links: tuple[SharedMemoryLink, SharedMemoryLink]
) -> None:
    inbox.watch(links[0], opened)
    began, used = time.monotonic(), time.thread_time()
    for _ in range(4):
        assert inbox.take(0.5) is None
    assert time.monotonic() - began >= 2.0
    assert time.thread_time() - used < 0.04
