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
from common.exchange.arrival import Arrival
from common.exchange.collective_group import CollectiveGroup, PendingCollective
from common.exchange.collective_windows import WorkerWindow
from common.exchange.inbox import Inbox
from common.exchange.routing import RowShape, expand_rows
from common.exchange.token_passes import ExpandRows, TokenPasses
from common.process_group import release

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Arrival(Arrival):
    """Rows, the router they came from, their slots in its window, and the reply once it was computed."""

    router: _Router | None = None
    reply: Tensor | None = None
    slots: Tensor | None = None


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
    expand: ExpandRows
    window: WorkerWindow | None
    step: StepHeader | None = None
    capacity: int = 0
    is_dropped: bool = False
    is_quiet: bool = False
    unanswered: deque[_Arrival] = field(default_factory=deque)
    replies: deque[PendingCollective] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)


class CollectiveExpertExchange:
    """An ExpertExchange over groups; a group that fails is dropped, those of other routers go on."""

    def __init__(self, on_closed: Callable[[int, int, str], None], expand: ExpandRows = expand_rows) -> None:
        """Call `on_closed(term, epoch, reason)` from a receive thread when a group ended by itself.

        `expand` picks a worker's rows from all tokens, as common.exchange.routing.expand_rows does.
        """
        self._on_closed = on_closed
        self._expand = expand
        self._arrivals: Inbox[_Arrival] = Inbox()
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
        with self._lock:
            if self._is_closed:
                raise LinkError("the exchange is closed: no router can be added")
            window = None if group.windows is None else WorkerWindow(group.windows, shape.dtype)
            origin = (self._count, term, epoch, incarnation)
            router = _Router(*origin, group, shape, experts, self._expand, window)
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
        arrival = self._arrivals.take(timeout_s, lambda one: not _router_of(one).is_dropped)
        if arrival is None:
            return None
        router = _router_of(arrival)
        return arrival.received(router.number, router.step is None or router.step.is_grouped)

    def reply(self, output: Tensor, received: Received) -> None:
        """Send output [R, D] home once all rows that came before have been answered."""
        arrival = received.handle
        if not isinstance(arrival, _Arrival):
            raise MessageError("these rows were not received by this exchange")
        router = _router_of(arrival)
        body = arrival.take(output, received, router.shape.dtype)
        if body is None:
            self._arrivals.put_back(arrival)
            return
        reply = _pack(router, arrival, body)
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

    def _drop_all(self, is_wanted: Callable[[_Router], bool], is_quiet: bool = False) -> None:
        with self._lock:
            dropped = [router for router in self._routers if is_wanted(router)]
            self._routers = [router for router in self._routers if router not in dropped]
        for router in dropped:
            router.is_quiet |= is_quiet
            _drop(router)

    def _receive_all(self, router: _Router) -> None:
        ended: ExchangeError | None = None
        try:
            words = torch.empty(message.OPENING_WORDS, dtype=torch.int64)
            router.group.metadata.broadcast(words).wait()  # an idle router costs nothing: no deadline here
            most_local = message.check_opening(words, router.experts)
            while not router.is_dropped:
                self._receive_one(router, message.metadata_words(most_local))
        except ExchangeError as error:
            ended = error
        router.is_quiet |= isinstance(ended, checks.RouterLeft)
        with self._lock:
            was_known = router in self._routers
            self._routers = [other for other in self._routers if other is not router]
        _drop(router)
        if was_known:
            level = logging.INFO if isinstance(ended, checks.RouterLeft) else logging.WARNING
            logger.log(level, "group of term %d, epoch %d ended: %s", router.term, router.epoch, ended)
            self._on_closed(router.term, router.epoch, str(ended))

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
            if header.is_window and not header.num_rows:
                return  # other workers' rows
            arrival = _receive_body(router, header, counts)
            with router.lock:
                router.unanswered.append(arrival)
            self._arrivals.put(arrival)
        else:
            raise MessageError(f"no message of kind {header.kind} comes from a router")

    def _begin(self, router: _Router, header: wire.Header) -> None:
        step = checks.check_step(header, router.step)
        if router.step is None:  # the first header commits the epoch
            # The router has no more rows for older ones.
            self._drop_all(
                lambda other: other.term == router.term and other.epoch < router.epoch, is_quiet=True
            )
        router.step, router.capacity = step, header.capacity_bytes


def _router_of(arrival: _Arrival) -> _Router:
    if arrival.router is None:
        raise MessageError("rows without a router")
    return arrival.router


def _receive_body(router: _Router, header: wire.Header, counts: Tensor) -> _Arrival:
    shape, device, step = router.shape, router.group.device, router.step
    checks.check_rows(header, step, router.experts, shape)
    num_local = len(router.experts[header.layer_id])
    if header.is_window:
        checks.check_counts(counts[:num_local], header.num_rows)
        if router.window is None:
            raise MessageError("rows were announced in a window, and there is none")
        rows, slots = router.window.receive(counts[:num_local], lambda: router.is_dropped)
        origin = (header, rows, None, counts[:num_local], None, time.monotonic_ns())
        return _Arrival(*origin, router=router, slots=slots)
    message.check_body(header, counts, num_local, shape, router.capacity)
    body = torch.empty(header.capacity_bytes, dtype=torch.uint8, device=device)
    if header.ep_level != ALL_GATHER:
        router.group.dispatch.receive(body).wait()
        *scales, rows = wire.view_arrays(body, *shape.sent_layout(header.layer_id, header.num_rows))
        row_scales, counts = scales[0] if scales else None, counts[:num_local]
        return _Arrival(header, rows, row_scales, counts, None, time.monotonic_ns(), router=router)
    router.group.dispatch.broadcast(body).wait()
    received_ns = time.monotonic_ns()
    keys, weights, hidden_states = message.unpack_tokens(body, header.num_tokens, shape)
    keys, weights = keys.to(router.group.sums), weights.to(router.group.sums)
    checks.check_slot_keys(keys)
    pass_rows = step.pass_rows if step is not None else 0
    passes = TokenPasses(hidden_states, keys, weights, header.first_key, num_local, pass_rows, router.expand)
    return _Arrival(header, None, None, None, passes, received_ns, router=router)


def _pack(router: _Router, arrival: _Arrival, body: Tensor) -> Tensor:
    if arrival.slots is not None and router.window is not None:
        return router.window.pack(arrival.header, body)
    # Packed where the body is: sums in float64 are not where the group's tensors are.
    num_words = message.reply_words(arrival.header, router.shape)
    reply = torch.empty(num_words, dtype=torch.int64, device=body.device)
    wire.pack(reply.view(torch.uint8), arrival.header, body)
    return reply.to(router.group.device)


def _send_answered(router: _Router) -> None:
    while not router.is_dropped and router.unanswered and (reply := router.unanswered[0].reply) is not None:
        slots = router.unanswered.popleft().slots
        if slots is not None and router.window is not None:
            router.window.send(reply, slots)
        else:
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
        is_quiet = router.is_quiet and not (router.window is not None and router.window.is_awaiting)
        router.unanswered.clear()
    router.group.close(is_quiet)
    release(pending)
