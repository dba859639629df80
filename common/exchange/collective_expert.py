"""The expert worker's end of the groups: a receive thread per router, one queue for the computing thread.

The collectives of a lane have one order on all ranks, so replies leave in the order in which rows arrived.
Shapes: T tokens, K experts per token, R rows, D hidden_size, E_local experts a worker holds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.errors import ExchangeError, LinkError, MessageError
from common.exchange import ALL_GATHER, Received, StepHeader, checks, wire
from common.exchange import collective_message as message
from common.exchange.collective_group import CollectiveGroup, PendingCollective
from common.exchange.received_queue import ReceivedQueue
from common.exchange.routing import LocalRows, RowShape, expand_rows, local_table, partial_sum
from common.process_group import release

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Arrival:
    """What a reply needs to know about the rows it answers; `reply` once it was computed."""

    router: _Router
    header: wire.Header
    local: LocalRows | None
    received_ns: int
    compute_start_ns: int = 0
    reply: Tensor | None = None


@dataclass(slots=True, eq=False)
class _Router:
    """A router as its receive thread sees it; the lock guards what the computing thread touches too."""

    number: int
    term: int
    epoch: int
    incarnation: int
    group: CollectiveGroup
    shape: RowShape
    experts: Mapping[int, tuple[int, ...]]
    tables: dict[int, Tensor]
    step: StepHeader | None = None
    capacity: int = 0
    is_dropped: bool = False
    unanswered: deque[_Arrival] = field(default_factory=deque)
    replies: deque[PendingCollective] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)


class CollectiveExpertExchange:
    """An ExpertExchange over groups; a group that fails is dropped, those of other routers go on."""

    def __init__(self, on_closed: Callable[[int, int, str], None]) -> None:
        """Call `on_closed(term, epoch, reason)` from a receive thread when a group ended by itself."""
        self._on_closed = on_closed
        self._arrivals = ReceivedQueue()
        self._routers: list[_Router] = []
        self._lock = threading.Lock()
        self._count = 0
        self._is_closed = False

    def add_router(
        self,
        term: int,
        epoch: int,
        incarnation: int,
        group: CollectiveGroup,
        shape: RowShape,
        experts: Mapping[int, tuple[int, ...]],
    ) -> None:
        """Receive on a group; an older epoch of the term goes on until this one's first step header."""
        tables = {layer_id: local_table(own) for layer_id, own in experts.items()}
        with self._lock:
            if self._is_closed:
                raise LinkError("the exchange is closed: no router can be added")
            router = _Router(self._count, term, epoch, incarnation, group, shape, experts, tables)
            self._count += 1
            self._routers.append(router)
        threading.Thread(
            target=self._receive_all, args=(router,), name=f"router-{term}-{epoch}", daemon=True
        ).start()

    def forget(self, term: int) -> None:
        """Drop every group of a term."""
        self._drop_all(lambda router: router.term == term)

    def receive(self, timeout_s: float | None = None) -> Received | None:
        """Wait for rows from any router; None when the time passed or the exchange was closed."""
        received = self._arrivals.take(timeout_s, lambda one: not _arrival_of(one).router.is_dropped)
        if received is not None:
            _arrival_of(received).compute_start_ns = time.monotonic_ns()
        return received

    def reply(self, output: Tensor, received: Received) -> None:
        """Send output [R, D] home once all rows that came before have been answered."""
        arrival = _arrival_of(received)
        if output.shape != received.rows.shape:
            raise MessageError(f"output {tuple(output.shape)} must match rows {tuple(received.rows.shape)}")
        reply = _pack_reply(arrival, output)
        router = arrival.router
        with router.lock:
            arrival.reply = reply
            try:
                _send_answered(router)
            except LinkError:
                return  # the receive thread sees the same failure and reports it

    def close(self) -> None:
        """Drop every group and wake the thread in `receive`."""
        self._is_closed = True
        self._drop_all(lambda router: True)
        self._arrivals.close()

    def _drop_all(self, is_wanted: Callable[[_Router], bool]) -> None:
        with self._lock:
            dropped = [router for router in self._routers if is_wanted(router)]
            self._routers = [router for router in self._routers if router not in dropped]
        for router in dropped:
            _drop(router)

    def _receive_all(self, router: _Router) -> None:
        reason = ""
        try:
            words = torch.empty(message.OPENING_WORDS, dtype=torch.int64)
            router.group.metadata.broadcast(words).wait()  # an idle router costs nothing: no deadline here
            most_local = message.check_opening(words, router.experts)
            while not router.is_dropped:
                self._receive_one(router, message.metadata_words(most_local))
        except ExchangeError as error:
            reason = str(error)
        with self._lock:
            was_known = router in self._routers
            self._routers = [other for other in self._routers if other is not router]
        _drop(router)
        if was_known:
            logger.warning("group of term %d, epoch %d ended: %s", router.term, router.epoch, reason)
            self._on_closed(router.term, router.epoch, reason)

    def _receive_one(self, router: _Router, num_words: int) -> None:
        words = torch.empty(num_words, dtype=torch.int64)
        router.group.metadata.receive(words).wait()
        if router.is_dropped:
            return
        _forget_sent(router)
        header, counts = message.unpack_metadata(words)
        checks.check_origin(header, router.term, router.epoch, router.incarnation)
        if header.kind == wire.STEP:
            self._begin(router, header)
        elif header.kind == wire.ROWS:
            received = _receive_body(router, header, counts)
            with router.lock:
                router.unanswered.append(_arrival_of(received))
            self._arrivals.put(received)
        else:
            raise MessageError(f"the router ended the group (message kind {header.kind})")

    def _begin(self, router: _Router, header: wire.Header) -> None:
        step = checks.check_step(header, router.step)
        if router.step is None:  # the first header commits the epoch
            self._drop_all(lambda other: other.term == router.term and other.epoch < router.epoch)
        router.step, router.capacity = step, header.capacity_bytes


def _arrival_of(received: Received) -> _Arrival:
    if not isinstance(received.handle, _Arrival):
        raise MessageError("these rows were not received by this exchange")
    return received.handle


def _receive_body(router: _Router, header: wire.Header, counts: Tensor) -> Received:
    shape, device = router.shape, router.group.device
    checks.check_rows(header, router.step, router.experts)
    num_local = len(router.experts[header.layer_id])
    message.check_body(header, counts, num_local, shape, router.capacity)
    local: LocalRows | None = None
    if header.ep_level == ALL_GATHER:
        body = torch.empty(header.capacity_bytes, dtype=torch.uint8, device=device)
        router.group.dispatch.broadcast(body).wait()
        received_ns = time.monotonic_ns()
        ids, weights, hidden = message.unpack_tokens(body, header.num_tokens, shape)
        checks.check_topk_ids(ids)
        local = expand_rows(hidden, ids, weights, router.tables[header.layer_id], num_local)
        rows, counts = local.rows, local.tokens_per_expert
    else:
        rows = torch.empty(header.num_rows, shape.hidden_size, dtype=shape.dtype, device=device)
        router.group.dispatch.receive(rows).wait()
        received_ns = time.monotonic_ns()
        counts = counts[:num_local]
    return Received(
        router.number,
        router.term,
        router.epoch,
        header.step_id,
        header.layer_id,
        header.micro_batch,
        header.round,
        rows,
        counts,
        _Arrival(router, header, local, received_ns),
    )


def _pack_reply(arrival: _Arrival, output: Tensor) -> Tensor:
    router, header = arrival.router, arrival.header
    compute_end_ns = time.monotonic_ns()
    body = output.to(router.shape.dtype)
    if arrival.local is not None:
        body = partial_sum(body, arrival.local)
    words = message.reply_words(header, router.shape)
    header.kind = wire.REPLY
    header.received_ns, header.compute_start_ns = arrival.received_ns, arrival.compute_start_ns
    header.compute_end_ns = compute_end_ns
    reply = torch.empty(words, dtype=torch.int64, device=router.group.device)
    wire.pack(reply.view(torch.uint8), header, body)
    return reply


def _send_answered(router: _Router) -> None:
    while not router.is_dropped and router.unanswered and (reply := router.unanswered[0].reply) is not None:
        router.unanswered.popleft()
        router.replies.append(router.group.combine.send(reply))


def _forget_sent(router: _Router) -> None:
    # A reply leaves when those of all workers are there: waiting for it here would hold the next rows up.
    with router.lock:
        while router.replies and router.replies[0].is_done:
            router.replies.popleft().wait()


def _drop(router: _Router) -> None:
    with router.lock:
        router.is_dropped = True
        pending: list[Any] = [*router.replies, *router.unanswered]
        router.replies.clear()
        router.unanswered.clear()
    router.group.close()
    release(pending)
