"""What the router's end of the links has in flight, and what it knows of each worker.

Shapes: T tokens, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from common.exchange import Dispatched, wire
from common.exchange.deadline import Deadline
from common.exchange.message_link import MessageLink
from common.exchange.message_views import MessageViews


@dataclass(frozen=True, slots=True)
class Reply:
    """What came for one message, in the order in which it is summed up.

    Attributes:
        order: the first of its rows at level 2, the worker's ep_rank at level 1.
        body: its rows, or its sums; they lie in `buffer`, which goes back to `link`.
    """

    order: int
    body: Tensor
    buffer: Tensor
    link: MessageLink


@dataclass(slots=True)
class InFlight(Dispatched):
    """A dispatch whose replies are collected: rows by slot at level 2, one sum per worker at level 1.

    Attributes:
        position_of: [T, K] the row of each slot at level 2.
    """

    topk_weights: Tensor
    position_of: Tensor | None = None
    replies: list[Reply] = field(default_factory=list)
    missing: int = 0


@dataclass(slots=True)
class Request:
    """One message that was sent and not answered yet.

    Attributes:
        header: of its worker and step: what its reply has to name.
        begin: the first of its rows at level 2, of all workers' rows.
    """

    owner: InFlight
    header: wire.Header
    begin: int
    num_rows: int
    num_bytes: int
    posted_ns: int


@dataclass(slots=True)
class Worker:
    """A link and what is known about it.

    Attributes:
        views: of its replies.
        header: of the rows of a step; each message of them overwrites what differs.
        unanswered_rows: of all requests.
    """

    ep_rank: int
    name: str
    incarnation: int
    link: MessageLink
    deadline: Deadline
    views: MessageViews
    header: wire.Header = field(default_factory=lambda: wire.Header(wire.ROWS, 0, 0, 0, 0))
    unanswered_rows: int = 0
    requests: dict[tuple[int, int, int], Request] = field(default_factory=dict)
    unsettled: int = 0
    progress: int | None = None
    times: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def header_for(self, flight: InFlight) -> wire.Header:
        """The header of a message of rows, without what differs between those of one flight."""
        header = self.header
        header.layer_id, header.micro_batch = flight.layer_id, flight.micro_batch
        header.num_tokens = flight.num_tokens
        return header
