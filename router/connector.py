"""Joins the workers of an epoch beside the running one, in a thread of its own for each epoch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from common.errors import ExchangeError
from router.engine import Membership
from router.joining import JOIN, LinkAddress, MemberMissing, RouterEnd
from router.messages import Connect, LinkFailed

logger = logging.getLogger(__name__)


class Connector:
    """Turns Connect into a Membership, or into LinkFailed. Owned by the main thread.

    Only the epoch asked for last is wanted; one that is superseded or given up is closed when it arrives.
    """

    def __init__(
        self,
        exchange: str,
        address: LinkAddress,
        end: RouterEnd,
        deliver: Callable[[Membership | LinkFailed], None],
    ) -> None:
        """Join by `exchange`, "links" or "collective"; what comes of it goes to `deliver`."""
        self._join = JOIN[exchange]
        self._address = address
        self._end = end
        self._deliver = deliver
        self._wanted: int | None = None

    def connect(self, message: Connect) -> None:
        """Begin to join; what comes of it is delivered from another thread."""
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
        try:
            exchange = self._join(message, self._address, self._end)
            self._deliver(
                Membership(
                    message.epoch,
                    exchange,
                    len(message.members),
                    exchange.last_step_times,
                    exchange.set_deadline_floor,
                    tuple(exchange.transports()),
                    message.waits_for_commit,
                )
            )
        except Exception as error:
            # Whatever went wrong, the front must hear of it.
            if not isinstance(error, ExchangeError):
                logger.exception("joining epoch %d failed", message.epoch)
            ep_rank = error.ep_rank if isinstance(error, MemberMissing) else -1
            self._deliver(LinkFailed(message.epoch, ep_rank, str(error)))
