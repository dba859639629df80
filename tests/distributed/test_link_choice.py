"""What a router and a worker link up by: as both are told, and as what they prove to share allows."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from common import process_group, same_host
from common.errors import LinkError
from common.exchange.link_choice import Meeting, join_router, join_worker
from common.exchange.message_link import MessageLink
from common.same_host import Host, NotShared, Offer, prove, reach
from tests.distributed import fleet_of_threads as fleet

pytestmark = pytest.mark.distributed


def meet(router: str, worker: str) -> tuple[MessageLink | Exception, MessageLink | Exception]:
    """Link up a router and a worker with these settings."""
    store = process_group.open_store(fleet.HOST)
    meeting = replace(fleet.meeting(store, "here", router), timeout_s=5.0)

    def joined(join: object, place: Meeting) -> MessageLink | Exception:
        try:
            return join(place)  # type: ignore[operator]
        except LinkError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(joined, join_worker, meeting),
            pool.submit(joined, join_router, replace(meeting, same_host=worker)),
        ]
        found = tuple(end.result(30) for end in ends)
    for link in found:
        if not isinstance(link, Exception):
            link.close()
    # Only links of Gloo leave keys behind, in a store of their own.
    return found[0], found[1]


@pytest.mark.parametrize(
    ("router", "worker", "transport"),
    [
        ("auto", "auto", "sharedMemory"),
        ("sharedMemory", "auto", "sharedMemory"),
        ("auto", "sharedMemory", "sharedMemory"),
        ("links", "auto", "links: the router's sameHostTransport is links"),
        ("auto", "links", "links: the worker's sameHostTransport is links"),
    ],
)
def test_a_pair_links_up_as_both_allow(router: str, worker: str, transport: str) -> None:
    ends = meet(router, worker)
    assert [getattr(end, "transport", end) for end in ends] == [transport] * 2


def test_who_is_told_to_share_memory_and_cannot_says_why() -> None:
    refused, _ = meet("sharedMemory", "links")
    assert isinstance(refused, LinkError)
    assert "the worker's sameHostTransport is links" in str(refused)
    assert "choose auto or links" in str(refused)


def test_another_boot_of_a_kernel_is_another_host() -> None:
    host = Host()
    try:
        with pytest.raises(NotShared, match="another host"):
            reach(replace(host.offer, boot="another"))
    finally:
        host.close()


def test_a_socket_that_is_not_there_is_in_another_network_namespace() -> None:
    host = Host()
    host.close()
    with pytest.raises(NotShared, match="network namespace"):
        reach(host.offer)


def test_who_does_not_know_the_secret_shares_nothing() -> None:
    host = Host()
    said: list[Exception] = []

    def accept() -> None:
        try:
            host.accept()
        except NotShared as error:
            said.append(error)

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        with pytest.raises(NotShared):
            prove(reach(host.offer), "a guess")
        accepting.join(30)
        assert "secret" in str(said[0])
    finally:
        host.close()


def test_a_worker_that_sees_other_memory_shares_none() -> None:
    host = Host()

    def answer_wrongly() -> None:
        end, _ = host._listener.accept()
        with end:
            socket.recv_fds(end, 4096, 1)
            end.sendall(bytes(same_host.PROOF_BYTES))
            end.recv(10)

    answering = threading.Thread(target=answer_wrongly)
    answering.start()
    try:
        with pytest.raises(NotShared, match="does not see"):
            prove(reach(host.offer), host.offer.secret)
    finally:
        answering.join(30)
        host.close()


@pytest.mark.parametrize("text", ["", "[]", '{"boot": 1}', "{"])
def test_an_offer_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(NotShared):
        Offer.parse(text)
