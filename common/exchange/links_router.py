"""The router's end of the links.

Deadlines may be extended, so they are kept here, on the inbox where answers arrive, and not on the links.
Shapes: T tokens, K experts per token, R rows, D hidden_size, E_local experts of a worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from common.errors import LinkError, MessageError, WorkerLost
from common.exchange import ALL_GATHER, Dispatched, Extra, RowOrigins, StepHeader, wire
from common.exchange.deadline import CEILING_S, Deadline
from common.exchange.decode_messages import DecodeMessages
from common.exchange.inbox import REPLY_SPIN_NS, Inbox
from common.exchange.links_expert import say_goodbye
from common.exchange.links_flight import InFlight, Reply, Request, Worker
from common.exchange.message_link import MessageLink
from common.exchange.message_views import MessageViews
from common.exchange.reply_spans import add_reply_spans
from common.exchange.routing import RowShape, sum_partials, weighted_sum
from common.exchange.row_messages import RowMessages
from common.exchange.sent_rows import rows_to_send
from common.exchange.slot_tables import SlotTables, buffer_rows, count_extra_rounds, message_rows
from common.placement import Placement
from common.timeline import Timeline

PROBE_S = 0.05
"""Pause between the first two questions for progress, which give the baseline."""
MOST_UNSETTLED = 64


Arrival = tuple[int, Tensor | LinkError, int]
_Written = tuple[Worker, Tensor, int, int]
"""Whose message, itself, the first of its rows, and how many it has."""


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
            Worker(rank, name, incarnation, link, Deadline(floor_s), MessageViews(shape, link.keeps_memory))
            for rank, (link, name, incarnation) in enumerate(zip(links, names, incarnations, strict=True))
        ]
        self._slots = SlotTables(placement)
        self._decode_messages = DecodeMessages.open(links, self._slots, shape, self._room)
        self._shape, self._term = shape, term
        self._no_rows = torch.empty(0, shape.hidden_size, dtype=shape.dtype)
        self._ask_progress, self._timeline = ask_progress, timeline
        self._step: StepHeader | None = None
        self._message_rows, self._reply_row_bytes = 1, 0
        self._capacity = wire.HEADER_BYTES
        self._arrivals: Inbox[Arrival] = Inbox(REPLY_SPIN_NS)
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
        is_level_1 = header.ep_level == ALL_GATHER
        self._reply_row_bytes = self._shape.hidden_size * 8 if is_level_1 else self._shape.row_bytes
        self._capacity = self._bytes_of_class(header)
        for worker in self._workers:
            worker.times = [0.0, 0.0, 0.0]
            worker.header = self._header(worker, wire.ROWS, header)
            message = self._header(worker, wire.STEP, header)
            message.capacity_bytes, message.micro_batches = self._capacity, header.micro_batches
            message.pass_rows = header.pass_rows
            message.is_grouped = int(header.is_grouped)
            self._post(worker, self._written(worker, message, (), "begin"), "begin", -1)
        if self._decode_messages is not None:
            self._decode_messages.begin(header, [worker.header for worker in self._workers])

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        """Send hidden_states [T, D] to the experts topk_ids [T, K]; weights [T, K]. Raises WorkerLost."""
        self._check_open()
        if self._step is None:
            raise MessageError("dispatch was called before begin: announce the step first")
        start_ns = time.monotonic_ns()
        flight = InFlight(layer_id, micro_batch, hidden_states.shape[0], topk_weights)
        if self._step.ep_level == ALL_GATHER:
            self._send_tokens(flight, hidden_states, self._slots.place(layer_id, micro_batch, topk_ids))
        elif not self._send_few_rows(flight, hidden_states, topk_ids):
            self._send_rows(self._step, flight, hidden_states, topk_ids)
        self._record("dispatch", start_ns, "router", layer_id)
        return flight

    def combine(self, dispatched: Dispatched) -> Tensor:
        """Wait for the experts and return their weighted sum, [T, D] float32. Raises WorkerLost."""
        self._check_open()
        if not isinstance(dispatched, InFlight):
            raise LinkError("these rows were dispatched by another exchange: combine them there")
        start_ns = time.monotonic_ns()
        while dispatched.missing:
            self._take_arrival()
        self._record("wait", start_ns, "router", dispatched.layer_id)
        start_ns = time.monotonic_ns()
        # Each is read where it came; the parts of what was sorted lie in the order in which they were cut.
        replies = sorted(dispatched.replies, key=attrgetter("order"))
        bodies = [reply.body for reply in replies]
        if dispatched.position_of is None:
            combined = sum_partials(bodies)
        else:
            combined = weighted_sum(
                bodies or [self._no_rows], dispatched.position_of, dispatched.topk_weights
            )
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
        self._decode_messages = None  # it holds memory of the links
        self._arrivals.close()
        for worker in self._workers:
            self._arrivals.forget(worker.link)
            header = wire.Header(wire.GOODBYE, self._term, self._epoch, worker.incarnation, 0)
            threading.Thread(target=say_goodbye, args=(worker.link, header), daemon=True).start()

    @property
    def _epoch(self) -> int:
        return self._step.epoch if self._step is not None else 0

    def _send_tokens(self, flight: InFlight, hidden_states: Tensor, slot_keys: Tensor) -> None:
        most_local = self._slots.table(flight.layer_id).most_local
        arrays = (slot_keys, flight.topk_weights, hidden_states)
        written: list[_Written] = []
        for worker in self._workers:
            header = worker.header_for(flight)
            header.first_key = worker.ep_rank * most_local
            message = self._written(worker, header, arrays, "dispatch")
            written.append((worker, message, 0, flight.num_tokens))
        self._send(flight, 0, written)

    def _send_few_rows(self, flight: InFlight, hidden_states: Tensor, topk_ids: Tensor) -> bool:
        """Send the rows of a decode step by one call for all workers; False where that cannot be."""
        if self._decode_messages is None:
            return False
        made = self._decode_messages.write(flight.layer_id, flight.micro_batch, hidden_states, topk_ids)
        if made is None:
            return False
        written, flight.position_of = made
        self._send(flight, 0, [(self._workers[rank], *message) for rank, message in written])
        return True

    def _send_rows(self, step: StepHeader, flight: InFlight, hidden_states: Tensor, topk_ids: Tensor) -> None:
        sorted_rows = self._slots.route(flight.layer_id, flight.micro_batch, topk_ids)
        count_extra_rounds(self.extra, step, sorted_rows)
        flight.position_of = sorted_rows.position_of
        sent = rows_to_send(hidden_states, sorted_rows.token_of, self._shape.quantizer(flight.layer_id))
        num_local = self._slots.table(flight.layer_id).num_local
        messages = RowMessages(sorted_rows, sent, self._message_rows, num_local)
        for index in range(max(messages.rounds)):
            due = [worker for worker in self._workers if index < messages.rounds[worker.ep_rank]]
            self._send(flight, index, [self._written_rows(worker, flight, messages, index) for worker in due])

    def _written_rows(self, worker: Worker, flight: InFlight, messages: RowMessages, index: int) -> _Written:
        rank = worker.ep_rank
        begin, end = messages.span(rank, index)
        header = worker.header_for(flight)
        header.round, header.rounds = index, messages.rounds[rank]
        header.num_rows, header.num_experts = end - begin, messages.num_local[rank]
        header.is_int8 = int(messages.sent.scales is not None)
        num_bytes = messages.num_bytes(rank, end - begin)
        message = wire.front(self._room(rank, min(num_bytes, self._capacity), flight.layer_id), num_bytes)
        wire.write_header(message, header)
        messages.write(message, rank, begin, end)
        return worker, message, begin, end - begin

    def _room(self, ep_rank: int, num_bytes: int, layer_id: int) -> Tensor:
        worker = self._workers[ep_rank]
        try:
            return worker.link.message(num_bytes)
        except LinkError as error:
            raise self._lost(worker, "dispatch", str(error), layer_id) from error

    def _send(self, flight: InFlight, index: int, written: Sequence[_Written]) -> None:
        """Send one message to each of some workers, and wait for their replies from here on.

        A message wakes its worker, which then takes turns with this thread, and may keep it from its core
        until it has computed: all are written, and replies expected, before the first of them leaves.
        """
        layer_id = flight.layer_id
        for worker, message, begin, num_rows in written:
            # A goodbye may come instead of a reply, and fits: every buffer holds at least a header.
            try:
                worker.link.expect(wire.HEADER_BYTES + num_rows * self._reply_row_bytes)
            except LinkError as error:
                raise self._lost(worker, "dispatch", str(error), layer_id) from error
            now_ns = time.monotonic_ns()
            if not worker.requests:
                worker.deadline.waiting_since_ns = now_ns
            request = Request(flight, worker.header, begin, num_rows, message.numel(), now_ns)
            worker.requests[layer_id, flight.micro_batch, index] = request
            worker.unanswered_rows += num_rows
            worker.deadline.extend(worker.unanswered_rows)
            flight.missing += 1
        for worker, message, _, _ in written:
            self._post(worker, message, "dispatch", layer_id)

    def _bytes_of_class(self, step: StepHeader) -> int:
        top_k, shape = self._shape.num_experts_per_tok, self._shape
        if step.ep_level == ALL_GATHER:
            return wire.HEADER_BYTES + wire.size_class(step.num_tokens) * (top_k * 12 + shape.row_bytes)
        rows = shape.sent_bytes(self._slots.tables, buffer_rows(step, top_k))
        return wire.HEADER_BYTES + 8 * self._slots.most_local + rows

    def _header(self, worker: Worker, kind: int, step: StepHeader) -> wire.Header:
        header = wire.Header(kind, step.term, step.epoch, worker.incarnation, step.step_id)
        header.ep_level, header.num_tokens = step.ep_level, step.num_tokens
        return header

    def _written(self, worker: Worker, header: wire.Header, arrays: tuple[Tensor, ...], phase: str) -> Tensor:
        try:
            memory = worker.link.message(min(wire.total_bytes(*arrays), self._capacity))
            return wire.pack(memory, header, *arrays)
        except LinkError as error:
            raise self._lost(worker, phase, str(error), header.layer_id) from error

    def _post(self, worker: Worker, message: Tensor, phase: str, layer_id: int) -> None:
        try:
            worker.link.post(message)
            worker.unsettled += 1
            if worker.unsettled > MOST_UNSETTLED and not worker.requests:
                self._settle(worker)
        except LinkError as error:
            raise self._lost(worker, phase, str(error), layer_id) from error

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

    def _accept(self, worker: Worker, buffer: Tensor, arrived_ns: int) -> None:
        header = wire.unpack_header(buffer)
        request = worker.requests.pop((header.layer_id, header.micro_batch, header.round), None)
        if header.kind != wire.REPLY or request is None:
            raise MessageError(f"no reply was expected that looks like {header}")
        worker.unanswered_rows -= request.num_rows
        sent = request.header
        found = (header.term, header.epoch, header.incarnation, header.step_id)
        if found != (sent.term, sent.epoch, sent.incarnation, sent.step_id):
            raise MessageError(f"a reply of (term, epoch, incarnation, step) {found} came late")
        flight = request.owner
        if flight.position_of is None:
            self.extra.passes += header.rounds - 1
            shape = (request.num_rows, self._shape.hidden_size)
            order, body = worker.ep_rank, wire.unpack(buffer, header, (shape, torch.float64))[0]
        else:
            order, body = request.begin, worker.views.rows_home(buffer, header, request.num_rows)
        flight.replies.append(Reply(order, body, buffer, worker.link))
        flight.missing -= 1
        self._learn(worker, request, header, arrived_ns)

    def _learn(self, worker: Worker, request: Request, header: wire.Header, arrived_ns: int) -> None:
        worker.deadline.learn(request.num_rows, request.posted_ns, arrived_ns)
        at_worker_ns = header.compute_end_ns - header.received_ns
        worker.times[0] += (header.compute_start_ns - header.received_ns) / 1e9
        worker.times[1] += (header.compute_end_ns - header.compute_start_ns) / 1e9
        worker.times[2] += max(arrived_ns - request.posted_ns - at_worker_ns, 0) / 1e9
        add_reply_spans(self._timeline, worker.name, header, request.num_rows)
        worker.progress = None
        if worker.requests:
            worker.deadline.extend(worker.unanswered_rows)
        else:  # everything that was sent has been answered, so these waits return at once
            self._settle(worker)

    def _settle(self, worker: Worker) -> None:
        worker.unsettled = 0
        worker.link.settle(CEILING_S)

    def _expire(self, worker: Worker) -> None:
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
        worker.deadline.extend(worker.unanswered_rows)

    def _lost(self, worker: Worker, phase: str, cause: str, layer_id: int | None = None) -> WorkerLost:
        requests = list(worker.requests.values())
        if layer_id is None:
            layer_id = requests[0].owner.layer_id if requests else -1
        num_bytes = sum(request.num_bytes for request in requests)
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
