"""What the router's end of a group has under way: dispatches, and the requests each of them became.

Shapes: T tokens, K experts per token, R rows, D hidden_size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from queue import SimpleQueue

from torch import Tensor

from common.errors import LinkError
from common.exchange import Dispatched, wire
from common.exchange.collective_group import PendingCollective
from common.exchange.collective_windows import WindowReplies

Arrival = tuple[LinkError | None, int]
"""How a wait ended, and when."""


@dataclass(slots=True)
class InFlight(Dispatched):
    """A dispatch whose replies are collected: rows at level 2, one sum per worker at level 1.

    Attributes:
        position_of: level 2: [T, K] the row of `output` that each slot has.
        missing: requests that were not answered yet.
    """

    topk_weights: Tensor
    output: Tensor
    position_of: Tensor | None = None
    partials: list[Tensor] = field(default_factory=list)
    missing: int = 0


@dataclass(slots=True)
class Request:
    """One round to all workers that was not answered yet.

    Attributes:
        headers: what each worker was sent.
        begins: level 2: where each worker's rows begin in the owner's output.
        words: length of each worker's reply in the buffer.
        replies: where they come through windows, instead of the buffer.
    """

    owner: InFlight
    headers: list[wire.Header]
    begins: list[int]
    words: list[int]
    buffer: Tensor
    posted_ns: int
    replies: WindowReplies | None = None

    @property
    def most_rows(self) -> int:
        """Rows of the worker that has most to do."""
        return max(header.num_rows for header in self.headers)

    @property
    def num_bytes(self) -> int:
        """Bytes that all workers were sent."""
        return sum(header.num_bytes + header.capacity_bytes for header in self.headers)

    @property
    def asked(self) -> list[int]:
        """The workers that may be what it waits for: a gather does not say who is missing, windows do."""
        return list(range(len(self.headers))) if self.replies is None else self.replies.silent


def wait_all(
    waits: SimpleQueue[PendingCollective | WindowReplies | None], arrivals: SimpleQueue[Arrival]
) -> None:
    """Wait for one after another, until None comes or one fails; the router's thread for replies."""
    while (gathered := waits.get()) is not None:
        try:
            gathered.wait()
        except LinkError as error:
            arrivals.put((error, time.monotonic_ns()))
            return
        arrivals.put((None, time.monotonic_ns()))
