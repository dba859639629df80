"""The loop of an expert worker: rows in, experts, rows out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from common.exchange import ExpertExchange, Received
from common.scheduling import give_way_when_woken

POLL_S = 0.5


def serve(
    exchange: ExpertExchange, compute: Callable[[Received], Tensor], should_stop: Callable[[], bool]
) -> None:
    """Answer rows until told to stop; what is asked of `should_stop` is asked at least twice a second."""
    give_way_when_woken()  # on one host, to a router that is about to send rows to other workers
    while not should_stop():
        received = exchange.receive(POLL_S)
        if received is not None:
            exchange.reply(compute(received), received)
