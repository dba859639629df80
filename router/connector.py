"""Joins the links of an epoch beside the running one, in a thread of its own for each epoch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from common import process_group
from common.errors import ExchangeError
from common.exchange.links import LinksRouterExchange
from common.exchange.routing import RowShape
from common.placement import Placement
from common.process_group import PairLink, StoreServer
from router.engine import Membership
from router.messages import Connect, LinkFailed

logger = logging.getLogger(__name__)

LEAST_WAIT_S = 0.5
"""What the last worker at its address gets, however long the others took."""


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where links are agreed on. Whoever holds it keeps the store's server alive.

    Attributes:
        data_address: this host's address on the data plane.
    """

    store: StoreServer
    data_address: str


class Connector:
    """Turns Connect into a Membership, or into LinkFailed. Owned by the main thread.

    Only the epoch asked for last is wanted; one that is superseded or given up is closed when it arrives.
    """

    def __init__(
        self,
        address: LinkAddress,
        shape: RowShape,
        *,
        term: int,
        floor_s: float,
        ask_progress: Callable[[int], int | None],
        deliver: Callable[[Membership | LinkFailed], None],
    ) -> None:
        self._address = address
        self._shape = shape
        self._term = term
        self._floor_s = floor_s
        self._ask_progress = ask_progress
        self._deliver = deliver
        self._wanted: int | None = None

    def connect(self, message: Connect) -> None:
        """Begin to join; what comes of it goes to `deliver`, from another thread."""
        self._wanted = message.epoch
        threading.Thread(
            target=self._run, args=(message,), name=f"connect-{message.epoch}", daemon=True
        ).start()

    def give_up(self, epoch: int) -> None:
        """Want an epoch no longer."""
        if self._wanted == epoch:
            self._wanted = None

    def wants(self, epoch: int) -> bool:
        """Whether this is the epoch that was asked for last."""
        return self._wanted == epoch

    def _run(self, message: Connect) -> None:
        links: list[PairLink] = []
        try:
            self._join_all(message, links)
            self._deliver(self._membership(message, links))
        except Exception as error:
            # Whatever went wrong, the front must hear of it, and no half of an epoch may stay.
            if not isinstance(error, ExchangeError):
                logger.exception("joining epoch %d failed", message.epoch)
            for link in links:
                link.close()
            failed = message.members[len(links)] if len(links) < len(message.members) else {"ep_rank": -1}
            self._deliver(LinkFailed(message.epoch, int(failed["ep_rank"]), str(error)))

    def _join_all(self, message: Connect, links: list[PairLink]) -> None:
        deadline = time.monotonic() + message.timeout_s
        for member in message.members:
            link = process_group.join_pair(
                self._address.store.host,
                self._address.store.port,
                prefix=str(member["prefix"]),
                rank=0,
                timeout_s=max(deadline - time.monotonic(), LEAST_WAIT_S),
                data_address=self._address.data_address,
            )
            links.append(link)  # one by one: what was joined before a failure is dropped by the caller

    def _membership(self, message: Connect, links: list[PairLink]) -> Membership:
        exchange = LinksRouterExchange(
            links,
            [str(member["worker"]) for member in message.members],
            placement_of(message),
            self._shape,
            self._term,
            [int(member["incarnation"]) for member in message.members],
            self._floor_s,
            self._ask_progress,
        )
        return Membership(message.epoch, exchange, exchange.last_step_times, exchange.set_deadline_floor)


def placement_of(message: Connect) -> Placement:
    """The placement of an epoch, as it came over the channel."""
    layers: dict[int, tuple[tuple[int, ...], ...]] = {}
    for layer_id, *owners in message.layers:
        layers[int(str(layer_id))] = tuple(tuple(owner) for owner in owners if isinstance(owner, list))
    return Placement(layers)
