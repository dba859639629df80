"""How a router and an expert worker are linked: by shared memory where they prove to have some, else by Gloo.

The worker offers, the router tries and says what it has chosen, both on the store that Gloo agrees on too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from common import process_group, same_host
from common.errors import LinkError
from common.exchange.message_link import MessageLink
from common.same_host import NotShared, Offer
from common.shared_memory_link import SharedMemoryLink

SHARED_MEMORY, LINKS = "sharedMemory", "links"
"""ExpertMesh.sameHostTransport; any other value leaves the choice to what is found."""
OFFER, CHOICE = "offer", "choice"
LEAST_WAIT_S = 0.5
"""What Gloo gets, however long it took to find out that no memory is shared."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where one link is agreed on, and how it may be made.

    Attributes:
        host, port: of the store.
        prefix: of the link's keys in it.
        timeout_s: how long to wait for the peer.
        data_address: this host's address on the data plane.
        same_host: ExpertMesh.sameHostTransport of this process.
    """

    host: str
    port: int
    prefix: str
    timeout_s: float
    data_address: str
    same_host: str


def join_router(meeting: Meeting) -> MessageLink:
    """Link up as the expert worker. Raises LinkError."""
    return _join(meeting, _share_as_worker, 1)


def join_worker(meeting: Meeting) -> MessageLink:
    """Link up as the router. Raises LinkError."""
    return _join(meeting, _share_as_router, 0)


def _join(meeting: Meeting, share: Callable[[Any, Meeting], MessageLink], rank: int) -> MessageLink:
    began = time.monotonic()
    try:
        store = process_group.reach_store(meeting.host, meeting.port, meeting.timeout_s)
        link = share(process_group.scope(store, meeting.prefix), meeting)
    except NotShared as reason:
        if meeting.same_host == SHARED_MEMORY:
            raise LinkError(
                f"sameHostTransport is sharedMemory, but no memory is shared: {reason}; choose auto or links"
            ) from reason
        left_s = max(meeting.timeout_s - (time.monotonic() - began), LEAST_WAIT_S)
        place = (meeting.host, meeting.port, meeting.prefix, rank, left_s, meeting.data_address)
        return process_group.join_pair(*place, f"{LINKS}: {reason}")
    except RuntimeError as error:
        raise LinkError(
            f"link {meeting.prefix} over {meeting.host}:{meeting.port} was not agreed on within "
            f"{meeting.timeout_s:.1f} s: {process_group.first_line(error)}"
        ) from error
    if rank == 0:
        process_group.delete_keys(store, meeting.prefix)
    return link


def _share_as_worker(scoped: Any, meeting: Meeting) -> MessageLink:
    host, offer = _offer(meeting)
    try:
        scoped.set(OFFER, offer.text())
        scoped.wait([CHOICE], timedelta(seconds=meeting.timeout_s))
        refusal = scoped.get(CHOICE).decode()
        if refusal or host is None:
            raise NotShared(refusal)
        return SharedMemoryLink(host.accept(), SHARED_MEMORY)
    finally:
        if host is not None:
            host.close()


def _offer(meeting: Meeting) -> tuple[same_host.Host | None, Offer]:
    if meeting.same_host == LINKS:
        return None, Offer(refusal="the worker's sameHostTransport is links")
    try:
        host = same_host.Host()
    except NotShared as error:
        return None, Offer(refusal=str(error))
    return host, host.offer


def _share_as_router(scoped: Any, meeting: Meeting) -> MessageLink:
    scoped.wait([OFFER], timedelta(seconds=meeting.timeout_s))
    try:
        if meeting.same_host == LINKS:
            raise NotShared("the router's sameHostTransport is links")
        offer = Offer.parse(scoped.get(OFFER).decode())
        end = same_host.reach(offer)
    except NotShared as error:
        scoped.set(CHOICE, str(error))
        raise
    scoped.set(CHOICE, "")  # the worker answers from here on
    same_host.prove(end, offer.secret)
    return SharedMemoryLink(end, SHARED_MEMORY)
