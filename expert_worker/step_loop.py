"""The loop of an expert worker: rows in, experts, rows out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from common.exchange import ExpertExchange, Received

POLL_S = 0.5


def serve(
    exchange: ExpertExchange, compute: Callable[[Received], Tensor], should_stop: Callable[[], bool]
) -> None:
    """Answer rows until told to stop; what is asked of `should_stop` is asked at least twice a second."""
    while not should_stop():
        received = exchange.receive(POLL_S)
        if received is not None:
            exchange.reply(compute(received), received)
