"""The router's end of the links.

Deadlines may be extended, so they are kept here, on the inbox where answers arrive, and not on the links.
Shapes: T tokens, K experts per token, R rows, D hidden_size, E_local experts of a worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from operator import attrgetter

import torch
from torch import Tensor

from common.errors import LinkError, MessageError, WorkerLost
from common.exchange import ALL_GATHER, Dispatched, Extra, RowOrigins, StepHeader, wire
from common.exchange.deadline import CEILING_S, Deadline
from common.exchange.inbox import Inbox
from common.exchange.links_expert import say_goodbye
from common.exchange.message_link import MessageLink
from common.exchange.reply_spans import add_reply_spans
from common.exchange.routing import RowShape, SortedRows, sort_rows, sum_partials, weighted_sum
from common.exchange.sent_rows import SentRows, gather_rows
from common.exchange.slot_tables import SlotTables, buffer_rows, count_extra_rounds, message_rows
from common.placement import Placement
from common.timeline import Timeline

PROBE_S = 0.05
"""Pause between the first two questions for progress, which give the baseline."""
MOST_UNSETTLED = 64


@dataclass(frozen=True, slots=True)
class _Reply:
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
class _InFlight(Dispatched):
    """A dispatch whose replies are collected: rows by slot at level 2, one sum per worker at level 1.

    Attributes:
        no_rows: [0, D] in the dtype of rows.
    """

    sorted_rows: SortedRows | None
    topk_weights: Tensor
    no_rows: Tensor
    replies: list[_Reply] = field(default_factory=list)
    missing: int = 0


@dataclass(slots=True)
class _Request:
    """One message that was sent and not answered yet."""

    owner: _InFlight
    header: wire.Header
    begin: int
    num_rows: int
    posted_ns: int


@dataclass(slots=True)
class _Worker:
    """A link and what is known about it."""

    ep_rank: int
    name: str
    incarnation: int
    link: MessageLink
    deadline: Deadline
    requests: dict[tuple[int, int, int], _Request] = field(default_factory=dict)
    unsettled: int = 0
    progress: int | None = None
    times: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


Arrival = tuple[int, Tensor | LinkError, int]
_Outgoing = tuple[_Worker, wire.Header, tuple[Tensor, ...]]


class LinksRouterExchange:
    """A RouterExchange over links. After a WorkerLost it is closed and of no further use."""

    def __init__(
        self,
        links: Sequence[MessageLink],
        names: Sequence[str],
        placement: Placement,
        shape: RowShape,
        term: int,
        incarnations: Sequence[int],
        floor_s: float,
        ask_progress: Callable[[int], int | None] | None,
        timeline: Timeline | None = None,
    ) -> None:
        """Take over the links, in ep_rank order."""
        self.extra = Extra()
        self._workers = [
            _Worker(rank, name, incarnation, link, Deadline(floor_s))
            for rank, (link, name, incarnation) in enumerate(zip(links, names, incarnations, strict=True))
        ]
        self._slots = SlotTables(placement)
        self._shape, self._term = shape, term
        self._ask_progress, self._timeline = ask_progress, timeline
        self._step: StepHeader | None = None
        self._message_rows = 1
        self._capacity = wire.HEADER_BYTES
        self._arrivals: Inbox[Arrival] = Inbox()
        self._is_closed = False
        for worker in self._workers:
            self._arrivals.watch(worker.link, partial(_arrival, worker.ep_rank))

    def begin(self, header: StepHeader, origins: Sequence[RowOrigins] = ()) -> None:
        """Announce a step on every link. Raises WorkerLost."""
        self._check_open()
        if header.term != self._term:
            raise MessageError(f"a step of term {header.term} cannot use links of term {self._term}")
        self._step = header
        self._slots.begin(origins)
        self._message_rows = message_rows(header, self._shape.num_experts_per_tok)
        self._capacity = self._bytes_of_class(header)
        for worker in self._workers:
            worker.times = [0.0, 0.0, 0.0]
            message = self._header(worker, wire.STEP, -1, 0, header.num_tokens)
            message.capacity_bytes, message.micro_batches = self._capacity, header.micro_batches
            message.pass_rows = header.pass_rows
            message.is_grouped = int(header.is_grouped)
            self._post(*self._written(worker, message, (), "begin"), "begin")

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        """Send hidden_states [T, D] to the experts topk_ids [T, K]; weights [T, K]. Raises WorkerLost."""
        self._check_open()
        if self._step is None:
            raise MessageError("dispatch was called before begin: announce the step first")
        start_ns = time.monotonic_ns()
        num_tokens = hidden_states.shape[0]
        flight = _InFlight(layer_id, micro_batch, num_tokens, None, topk_weights, hidden_states[:0])
        keys = self._slots.place(layer_id, micro_batch, topk_ids)
        table = self._slots.table(layer_id)
        outgoing: list[list[_Outgoing]] = []
        if self._step.ep_level == ALL_GATHER:
            for worker in self._workers:
                header = self._header(worker, wire.ROWS, layer_id, micro_batch, num_tokens)
                header.first_key = worker.ep_rank * table.most_local
                reply_bytes = wire.HEADER_BYTES + num_tokens * self._shape.hidden_size * 8
                self._request(worker, _Request(flight, header, 0, num_tokens, start_ns), reply_bytes)
                outgoing.append([(worker, header, (keys, topk_weights, hidden_states))])
        else:
            sorted_rows = sort_rows(keys, table)
            count_extra_rounds(self.extra, self._step, sorted_rows)
            flight.sorted_rows = sorted_rows
            sent = gather_rows(hidden_states, sorted_rows.token_of, self._shape.quantizer(layer_id))
            outgoing = [self._requests_of(worker, flight, sorted_rows, sent) for worker in self._workers]
        # A message wakes its worker, which then takes turns with this thread, and may keep it from its core
        # until it has computed: all workers' messages of a round are written before the first of them leaves.
        for messages in zip_longest(*outgoing):
            due: list[_Outgoing] = [message for message in messages if message is not None]
            for written in [self._written(*message, "dispatch") for message in due]:
                self._post(*written, "dispatch")
        self._record("dispatch", start_ns, "router", layer_id)
        return flight

    def combine(self, dispatched: Dispatched) -> Tensor:
        """Wait for the experts and return their weighted sum, [T, D] float32. Raises WorkerLost."""
        self._check_open()
        if not isinstance(dispatched, _InFlight):
            raise LinkError("these rows were dispatched by another exchange: combine them there")
        start_ns = time.monotonic_ns()
        while dispatched.missing:
            self._take_arrival()
        self._record("wait", start_ns, "router", dispatched.layer_id)
        start_ns = time.monotonic_ns()
        # Each is read where it came; the parts of what was sorted lie in the order in which they were cut.
        replies = sorted(dispatched.replies, key=attrgetter("order"))
        bodies = [reply.body for reply in replies]
        if dispatched.sorted_rows is None:
            combined = sum_partials(bodies)
        else:
            position_of = dispatched.sorted_rows.position_of
            combined = weighted_sum(bodies or [dispatched.no_rows], position_of, dispatched.topk_weights)
        for reply in replies:
            reply.link.done(reply.buffer)
        dispatched.replies.clear()
        self._record("combine", start_ns, "router", dispatched.layer_id)
        return combined

    def set_deadline_floor(self, floor_s: float) -> None:
        """Give every worker another shortest time to answer, from the next rows on."""
        for worker in self._workers:
            worker.deadline.floor_s = floor_s

    def transports(self) -> list[str]:
        """Per ep_rank, what carries its rows, and why."""
        return [worker.link.transport for worker in self._workers]

    def last_step_times(self) -> list[list[float]]:
        """Per ep_rank, seconds of the last step: [receive, compute, reply]."""
        return [list(worker.times) for worker in self._workers]

    def close(self) -> None:
        """Drop every link; a living worker is told, a dead one costs no time."""
        if self._is_closed:
            return
        self._is_closed = True
        self._arrivals.close()
        for worker in self._workers:
            self._arrivals.forget(worker.link)
            header = wire.Header(wire.GOODBYE, self._term, self._epoch, worker.incarnation, 0)
            threading.Thread(target=say_goodbye, args=(worker.link, header), daemon=True).start()

    @property
    def _epoch(self) -> int:
        return self._step.epoch if self._step is not None else 0

    def _requests_of(
        self, worker: _Worker, flight: _InFlight, sorted_rows: SortedRows, sent: SentRows
    ) -> list[_Outgoing]:
        """Expect a reply to each message that takes a worker its rows, and return these messages."""
        outgoing: list[_Outgoing] = []
        first, end = sorted_rows.span(worker.ep_rank)
        num_local = self._slots.table(flight.layer_id).num_local[worker.ep_rank]
        counts = sorted_rows.counts[worker.ep_rank, :num_local]
        rounds = -(-(end - first) // self._message_rows)
        running = counts.cumsum(0) if rounds > 1 else counts
        for index in range(rounds):
            low = index * self._message_rows
            high = min(low + self._message_rows, end - first)
            if rounds > 1:
                counts = running.clamp(low, high).diff(prepend=torch.tensor([low]))
            header = self._header(worker, wire.ROWS, flight.layer_id, flight.micro_batch, flight.num_tokens)
            header.round, header.rounds = index, rounds
            header.num_rows, header.num_experts = high - low, num_local
            header.is_int8 = int(sent.scales is not None)
            request = _Request(flight, header, first + low, high - low, time.monotonic_ns())
            self._request(worker, request, wire.HEADER_BYTES + (high - low) * self._shape.row_bytes)
            outgoing.append((worker, header, (counts, *sent.arrays(first + low, first + high))))
        return outgoing

    def _bytes_of_class(self, step: StepHeader) -> int:
        top_k, shape = self._shape.num_experts_per_tok, self._shape
        if step.ep_level == ALL_GATHER:
            return wire.HEADER_BYTES + wire.size_class(step.num_tokens) * (top_k * 12 + shape.row_bytes)
        rows = shape.sent_bytes(self._slots.tables, buffer_rows(step, top_k))
        return wire.HEADER_BYTES + 8 * self._slots.most_local + rows

    def _header(
        self, worker: _Worker, kind: int, layer_id: int, micro_batch: int, num_tokens: int
    ) -> wire.Header:
        step = self._step
        if step is None:
            raise MessageError("a message was built before begin: announce the step first")
        header = wire.Header(kind, step.term, step.epoch, worker.incarnation, step.step_id)
        header.layer_id, header.micro_batch = layer_id, micro_batch
        header.ep_level, header.num_tokens = step.ep_level, num_tokens
        return header

    def _request(self, worker: _Worker, request: _Request, reply_bytes: int) -> None:
        # A goodbye may come instead of a reply, and fits: every buffer holds at least a header.
        try:
            worker.link.expect(reply_bytes)
        except LinkError as error:
            raise self._lost(worker, "dispatch", str(error), request.header) from error
        if not worker.requests:
            worker.deadline.waiting_since_ns = time.monotonic_ns()
        header = request.header
        worker.requests[header.layer_id, header.micro_batch, header.round] = request
        request.owner.missing += 1
        self._extend(worker)

    def _written(
        self, worker: _Worker, header: wire.Header, arrays: tuple[Tensor, ...], phase: str
    ) -> tuple[_Worker, Tensor, wire.Header]:
        try:
            memory = worker.link.message(min(wire.total_bytes(*arrays), self._capacity))
            return worker, wire.pack(memory, header, *arrays), header
        except LinkError as error:
            raise self._lost(worker, phase, str(error), header) from error

    def _post(self, worker: _Worker, message: Tensor, header: wire.Header, phase: str) -> None:
        try:
            worker.link.post(message)
            worker.unsettled += 1
            if worker.unsettled > MOST_UNSETTLED and not worker.requests:
                self._settle(worker)
        except LinkError as error:
            raise self._lost(worker, phase, str(error), header) from error

    def _take_arrival(self) -> None:
        waiting = [worker for worker in self._workers if worker.requests]
        next_worker = min(waiting, key=lambda worker: worker.deadline.at_ns)
        arrival = self._arrivals.take(next_worker.deadline.left_s)
        if arrival is None:
            self._check_open()
            self._expire(next_worker)
            return
        ep_rank, content, arrived_ns = arrival
        worker = self._workers[ep_rank]
        if isinstance(content, LinkError):
            raise self._lost(worker, "combine", str(content)) from content
        try:
            self._accept(worker, content, arrived_ns)
        except (MessageError, LinkError) as error:
            raise self._lost(worker, "combine", str(error)) from error

    def _accept(self, worker: _Worker, buffer: Tensor, arrived_ns: int) -> None:
        header = wire.unpack_header(buffer)
        request = worker.requests.pop((header.layer_id, header.micro_batch, header.round), None)
        if header.kind != wire.REPLY or request is None:
            raise MessageError(f"no reply was expected that looks like {header}")
        sent = request.header
        found = (header.term, header.epoch, header.incarnation, header.step_id)
        if found != (sent.term, sent.epoch, sent.incarnation, sent.step_id):
            raise MessageError(f"a reply of (term, epoch, incarnation, step) {found} came late")
        shape = (request.num_rows, self._shape.hidden_size)
        flight = request.owner
        if flight.sorted_rows is None:
            self.extra.passes += header.rounds - 1
            order, body = worker.ep_rank, wire.unpack(buffer, header, (shape, torch.float64))[0]
        else:
            order, body = request.begin, wire.unpack(buffer, header, (shape, self._shape.dtype))[0]
        flight.replies.append(_Reply(order, body, buffer, worker.link))
        flight.missing -= 1
        self._learn(worker, request, header, arrived_ns)

    def _learn(self, worker: _Worker, request: _Request, header: wire.Header, arrived_ns: int) -> None:
        worker.deadline.learn(request.num_rows, request.posted_ns, arrived_ns)
        at_worker_ns = header.compute_end_ns - header.received_ns
        worker.times[0] += (header.compute_start_ns - header.received_ns) / 1e9
        worker.times[1] += (header.compute_end_ns - header.compute_start_ns) / 1e9
        worker.times[2] += max(arrived_ns - request.posted_ns - at_worker_ns, 0) / 1e9
        add_reply_spans(self._timeline, worker.name, header, request.num_rows)
        worker.progress = None
        if worker.requests:
            self._extend(worker)
        else:  # everything that was sent has been answered, so these waits return at once
            self._settle(worker)

    def _settle(self, worker: _Worker) -> None:
        worker.unsettled = 0
        worker.link.settle(CEILING_S)

    def _extend(self, worker: _Worker) -> None:
        worker.deadline.extend(sum(request.num_rows for request in worker.requests.values()))

    def _expire(self, worker: _Worker) -> None:
        if self._ask_progress is None or worker.deadline.waited_s > CEILING_S:
            raise self._lost(worker, "combine", "no answer within the deadline")
        before = worker.progress
        if before is None:
            before = self._ask_progress(worker.ep_rank)
            time.sleep(PROBE_S)
        worker.progress = self._ask_progress(worker.ep_rank) if before is not None else None
        if not self._arrivals.is_empty():
            return  # something came while we asked: look at it first
        if worker.progress is None or worker.progress == before:
            raise self._lost(worker, "combine", "no answer within the deadline and no progress")
        self._extend(worker)

    def _lost(self, worker: _Worker, phase: str, cause: str, header: wire.Header | None = None) -> WorkerLost:
        requests = list(worker.requests.values())
        about = header or (requests[0].header if requests else None)
        layer_id = about.layer_id if about is not None else -1
        num_bytes = sum(request.header.num_bytes for request in requests)
        waited_s = worker.deadline.waited_s if requests else 0.0
        self.close()
        return WorkerLost(worker.ep_rank, worker.name, layer_id, phase, num_bytes, waited_s, cause)

    def _record(self, name: str, start_ns: int, track: str, layer_id: int) -> None:
        if self._timeline is not None:
            self._timeline.add(name, start_ns, time.monotonic_ns(), track, layer_id=layer_id)

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkError("the exchange is closed: connect the next epoch")


def _arrival(ep_rank: int, content: Tensor | LinkError, arrived_ns: int) -> Arrival:
    return ep_rank, content, arrived_ns
