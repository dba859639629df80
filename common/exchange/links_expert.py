"""The expert worker's end of the links: one per router, one inbox for the computing thread.

Shapes: T tokens, K experts per token, R rows, D hidden_size, E_local experts a worker holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from common.errors import ExchangeError, LinkError, MessageError
from common.exchange import ALL_GATHER, Received, StepHeader, checks, wire
from common.exchange.arrival import Arrival
from common.exchange.deadline import CEILING_S
from common.exchange.inbox import Inbox
from common.exchange.message_link import MessageLink
from common.exchange.message_views import MessageViews, ReplyViews
from common.exchange.routing import RowShape
from common.exchange.token_passes import TokenPasses
from common.native_rows import RowAnswers

logger = logging.getLogger(__name__)

GOODBYE_S = 1.0


@dataclass(slots=True)
class _Router:
    """A router as its messages show it."""

    number: int
    term: int
    epoch: int
    incarnation: int
    link: MessageLink
    shape: RowShape
    experts: Mapping[int, tuple[int, ...]]
    views: MessageViews
    answers: RowAnswers | None
    step: StepHeader | None = None
    capacity: int = wire.HEADER_BYTES
    is_in_force: bool = False
    is_dropped: bool = False


@dataclass(slots=True, eq=False)
class _Answerable:
    """A message that one call answers, from its router."""

    router: _Router
    answers: RowAnswers
    message: Tensor
    num_rows: int
    received_ns: int


@dataclass(slots=True, eq=False)
class _Arrival(Arrival):
    """Rows, the router they came from, the buffer they lie in, and the memory of their reply at level 2."""

    router: _Router | None = None
    buffer: Tensor | None = None
    reply: ReplyViews | None = None


class LinksExpertExchange:
    """An ExpertExchange over links; one that misbehaves is dropped, the others go on."""

    def __init__(self, on_closed: Callable[[int, int, str], None]) -> None:
        """Call `on_closed(term, epoch, reason)`, from any thread, when a link ended by itself."""
        self._on_closed = on_closed
        self._arrivals: Inbox[_Arrival | _Answerable] = Inbox()
        self._routers: list[_Router] = []
        self._lock = threading.Lock()
        self._count = 0
        self._is_closed = False

    def add_router(
        self,
        term: int,
        epoch: int,
        incarnation: int,
        link: MessageLink,
        shape: RowShape,
        experts: Mapping[int, tuple[int, ...]],
        answers: RowAnswers | None = None,
    ) -> None:
        """Receive on a link; an older epoch of the term goes on until this one's first step header.

        With `answers`, rows that these take are answered in `receive`, but for the first, from which whoever
        computes learns that the epoch is in force.
        """
        with self._lock:
            if self._is_closed:
                raise LinkError("the exchange is closed: no router can be added")
            views = MessageViews(shape, link.keeps_memory)
            router = _Router(self._count, term, epoch, incarnation, link, shape, experts, views, answers)
            self._count += 1
            self._routers.append(router)
        link.expect(router.capacity)
        self._arrivals.watch(link, partial(self._open, router))

    def forget(self, term: int) -> None:
        """Drop every link of a term."""
        self._drop_all(lambda router: router.term == term)

    def receive(self, timeout_s: float | None = None) -> Received | None:
        """Wait for rows from any router; None after rows that were answered here, too."""
        arrival = self._arrivals.take(timeout_s, lambda one: not _router_of(one).is_dropped)
        if isinstance(arrival, _Answerable):
            self._answer(arrival)
            return None
        if arrival is None:
            return None
        router = _router_of(arrival)
        arrival.reply = None if arrival.passes is not None else _reply_memory(router, arrival.header.num_rows)
        output = None if arrival.reply is None else arrival.reply.output
        return arrival.received(router.number, router.step is None or router.step.is_grouped, output)

    def reply(self, output: Tensor, received: Received) -> None:
        """Send output [R, D] home; a link that fails meanwhile is dropped, which the caller need not know."""
        arrival = received.handle
        if not isinstance(arrival, _Arrival):
            raise MessageError("these rows were not received by this exchange")
        router = _router_of(arrival)
        body = arrival.take(output, received, router.shape.dtype)
        if body is None:
            self._arrivals.put_back(arrival)
            return
        try:
            message = _reply_message(router, arrival, body)
            if arrival.buffer is not None:
                router.link.done(arrival.buffer)
            router.link.post(message)
            router.is_in_force = True
        except LinkError:
            return  # what receives on the link sees the same failure and reports it

    def close(self) -> None:
        """Drop every link and wake the thread in `receive`."""
        self._is_closed = True
        self._drop_all(lambda router: True)
        self._arrivals.close()

    def _answer(self, came: _Answerable) -> None:
        router, answers = came.router, came.answers
        try:
            memory = router.link.message(router.views.reply_bytes(came.num_rows))
            reply = router.views.reply(memory, came.num_rows).message
            if not answers.answer(came.message, came.num_rows, came.received_ns, reply):
                _refuse(router, came)
            router.link.done(came.message)
            router.link.post(reply)
        except ExchangeError as error:
            self._ended(router, error)

    def _drop_all(self, is_wanted: Callable[[_Router], bool]) -> None:
        with self._lock:
            dropped = [router for router in self._routers if is_wanted(router)]
            self._routers = [router for router in self._routers if router not in dropped]
        for router in dropped:
            router.is_dropped = True
            self._arrivals.forget(router.link)
            header = wire.Header(wire.GOODBYE, router.term, router.epoch, router.incarnation, 0)
            threading.Thread(target=say_goodbye, args=(router.link, header), daemon=True).start()

    def _open(
        self, router: _Router, message: Tensor | LinkError, received_ns: int
    ) -> _Arrival | _Answerable | None:
        """Take in what a router sent, from whichever thread receives on its link."""
        try:
            if isinstance(message, LinkError):
                raise message
            if router.is_dropped:
                return None
            router.link.settle(CEILING_S)  # the router was ready for every reply before it sent the rows
            answers = router.answers if router.is_in_force else None
            num_rows = None if answers is None else answers.num_rows(message)
            if answers is None or num_rows is None:
                return self._opened(router, message, received_ns)
            router.link.expect(router.capacity)
            return _Answerable(router, answers, message, num_rows, received_ns)
        except ExchangeError as error:
            self._ended(router, error)
            return None

    def _ended(self, router: _Router, error: ExchangeError) -> None:
        with self._lock:
            was_known = router in self._routers
            self._routers = [other for other in self._routers if other is not router]
        if was_known:
            router.is_dropped = True
            self._arrivals.forget(router.link)
            router.link.close()
            level = logging.INFO if isinstance(error, checks.RouterLeft) else logging.WARNING
            logger.log(level, "link of term %d, epoch %d ended: %s", router.term, router.epoch, error)
            self._on_closed(router.term, router.epoch, str(error))

    def _opened(self, router: _Router, buffer: Tensor, received_ns: int) -> _Arrival | None:
        header = wire.unpack_header(buffer)
        checks.check_origin(header, router.term, router.epoch, router.incarnation)
        arrival = None
        if header.kind == wire.STEP:
            self._begin(router, header)
            router.link.done(buffer)
        elif header.kind == wire.ROWS:
            arrival = _rows_of(router, header, buffer, received_ns)
        else:
            raise MessageError(f"no message of kind {header.kind} comes from a router")
        router.link.expect(router.capacity)
        return arrival

    def _begin(self, router: _Router, header: wire.Header) -> None:
        step = checks.check_step(header, router.step)
        if router.step is None:  # the first header commits the epoch
            self._drop_all(lambda other: other.term == router.term and other.epoch < router.epoch)
        router.step, router.capacity = step, header.capacity_bytes
        if router.answers is not None:
            router.answers.begin(header)


def _router_of(arrival: _Arrival | _Answerable) -> _Router:
    if arrival.router is None:
        raise MessageError("rows without a router")
    return arrival.router


def _reply_memory(router: _Router, num_rows: int) -> ReplyViews | None:
    try:
        memory = router.link.message(router.views.reply_bytes(num_rows))
    except LinkError:
        return None  # what receives on the link sees the same failure and reports it
    return router.views.reply(memory, num_rows)


def _reply_message(router: _Router, arrival: _Arrival, body: Tensor) -> Tensor:
    if arrival.reply is None:
        return wire.pack(router.link.message(wire.total_bytes(body)), arrival.header, body)
    message, output = arrival.reply
    if body is not output:  # the experts' device writes to memory of its own
        output.copy_(body)
    wire.write_header(message, arrival.header)
    return message


def _refuse(router: _Router, came: _Answerable) -> NoReturn:
    """Say what is wrong with a message that could not be answered. Raises MessageError."""
    header = wire.unpack_header(came.message)
    checks.check_rows(header, router.step, router.experts, router.shape)
    counts, *_ = router.views.sent(came.message, header, len(router.experts[header.layer_id]))
    checks.check_counts(counts, came.num_rows)
    raise MessageError(f"a message was changed while it lay here: {header}")


def _rows_of(router: _Router, header: wire.Header, buffer: Tensor, received_ns: int) -> _Arrival:
    shape, step = router.shape, router.step
    checks.check_rows(header, step, router.experts, shape)
    num_local = len(router.experts[header.layer_id])
    if header.ep_level != ALL_GATHER:
        counts, row_scales, rows = router.views.sent(buffer, header, num_local)
        checks.check_counts(counts, header.num_rows)
        return _Arrival(header, rows, row_scales, counts, None, received_ns, router=router, buffer=buffer)
    slots = (header.num_tokens, shape.num_experts_per_tok)
    hidden_shape = (header.num_tokens, shape.hidden_size)
    keys, weights, hidden_states = wire.unpack(
        buffer, header, (slots, torch.int64), (slots, torch.float32), (hidden_shape, shape.dtype)
    )
    checks.check_slot_keys(keys)
    pass_rows = step.pass_rows if step is not None else 0
    passes = TokenPasses(hidden_states, keys, weights, header.first_key, num_local, pass_rows)
    return _Arrival(header, None, None, None, passes, received_ns, router=router, buffer=buffer)


def say_goodbye(link: MessageLink, header: wire.Header) -> None:
    """Tell a living peer that the link ends, which frees its pending receive and ours; then close."""
    try:
        link.post(wire.pack(link.message(wire.HEADER_BYTES), header))
        link.settle(GOODBYE_S)
    except ExchangeError as error:
        logger.debug("no goodbye: %s", error)
    finally:
        link.close()
