"""The router's end of a group.

One thread waits for the gathers of replies, in their order: what a library does to a group whose wait expired
differs, so a deadline that may be extended is kept on the queue between that thread and `combine`.
Shapes: T tokens, K experts per token, R rows, D hidden_size, W workers, E_local experts of a worker.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from common.errors import LinkError, MessageError, WorkerLost
from common.exchange import ALL_GATHER, Dispatched, Extra, RowOrigins, StepHeader, wire
from common.exchange import collective_message as message
from common.exchange.collective_flight import Arrival, InFlight, Request, wait_all
from common.exchange.collective_group import CollectiveGroup, PendingCollective
from common.exchange.collective_windows import RouterWindow, WindowReplies
from common.exchange.deadline import CEILING_S, Deadline
from common.exchange.reply_spans import add_reply_spans
from common.exchange.rounds import cut_rounds
from common.exchange.routing import RowShape, sort_rows, sum_partials, weighted_sum
from common.exchange.sent_rows import rows_to_send
from common.exchange.silent_worker import Verdict, inquire
from common.exchange.slot_tables import SlotTables, buffer_rows, count_extra_rounds, message_rows
from common.placement import Placement
from common.process_group import release
from common.timeline import Timeline

LIMIT_S = CEILING_S + 60.0
"""When Gloo gives up by itself: later than any deadline here, soon enough to free what a lost group holds."""
DEATH_PROBES = 4
"""How often an agent is asked about an executor whose death it may not have noticed yet."""


class CollectiveRouterExchange:
    """A RouterExchange over a group. After a WorkerLost it is closed and of no further use."""

    def __init__(
        self,
        group: CollectiveGroup,
        names: Sequence[str],
        placement: Placement,
        shape: RowShape,
        term: int,
        incarnations: Sequence[int],
        floor_s: float,
        ask_progress: Callable[[int], int | None] | None,
        timeline: Timeline | None = None,
    ) -> None:
        """Take over the group.

        Raises:
            LinkError: the group does not have the size of the placement, or failed already.
        """
        if not group.size - 1 == len(names) == len(incarnations) == placement.ep_size:
            raise LinkError(
                f"a group of {group.size} ranks cannot serve {placement.ep_size} workers: it needs one more"
            )
        self._group, self._names, self._incarnations = group, list(names), list(incarnations)
        self._slots = SlotTables(placement)
        self._most_local = self._slots.most_local
        self._shape, self._term = shape, term
        self._ask_progress, self._timeline = ask_progress, timeline
        self.extra = Extra()
        self._step: StepHeader | None = None
        self._message_rows = 1
        self._requests: deque[Request] = deque()
        self._sends: deque[PendingCollective] = deque()
        self._waits: SimpleQueue[PendingCollective | WindowReplies | None] = SimpleQueue()
        self._arrivals: SimpleQueue[Arrival] = SimpleQueue()
        self._deadline = Deadline(floor_s)
        self._times = [[0.0, 0.0, 0.0] for _ in names]
        self._is_closed = False
        self._window = None if group.windows is None else RouterWindow(group.windows, shape.dtype)
        group.limit(LIMIT_S)
        self._sends.append(group.metadata.broadcast(message.opening(self._most_local)))
        threading.Thread(
            target=wait_all, args=(self._waits, self._arrivals), name="replies", daemon=True
        ).start()

    def begin(self, header: StepHeader, origins: Sequence[RowOrigins] = ()) -> None:
        """Announce a step to every worker. Raises WorkerLost."""
        self._check_open()
        if header.term != self._term:
            raise MessageError(f"a step of term {header.term} cannot use a group of term {self._term}")
        self._step = header
        self._slots.begin(origins)
        top_k, tokens = self._shape.num_experts_per_tok, wire.size_class(header.num_tokens)
        self._message_rows = message_rows(header, top_k)
        sizes = (self._slots.tables, tokens, buffer_rows(header, top_k), self._shape)
        capacity = wire.HEADER_BYTES + message.body_bytes(header.ep_level, *sizes)
        self._times = [[0.0, 0.0, 0.0] for _ in self._names]
        headers = [self._header(wire.STEP, ep_rank, header) for ep_rank in range(len(self._names))]
        for one in headers:
            one.capacity_bytes, one.micro_batches = capacity, header.micro_batches
            one.pass_rows = header.pass_rows
            one.is_grouped = int(header.is_grouped)
        try:
            self._send_metadata(headers, None)
        except LinkError as error:
            raise self._broken(error, "begin", -1) from error

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        """Send hidden_states [T, D] to the experts topk_ids [T, K]; weights [T, K]. Raises WorkerLost."""
        self._check_open()
        step = self._step
        if step is None:
            raise MessageError("dispatch was called before begin: announce the step first")
        start_ns = time.monotonic_ns()
        num_tokens = hidden_states.shape[0]
        weights = topk_weights.to(self._group.sums)
        flight = InFlight(layer_id, micro_batch, num_tokens, weights, hidden_states[:0])
        try:
            # Sizes are the host's to know: sorting there costs one transfer of a few numbers per token.
            keys = self._slots.place(layer_id, micro_batch, topk_ids.cpu())
            if step.ep_level == ALL_GATHER and num_tokens:
                self._dispatch_tokens(step, flight, hidden_states, keys)
            elif num_tokens:
                self._dispatch_rows(step, flight, hidden_states, keys)
        except LinkError as error:
            raise self._broken(error, "dispatch", layer_id) from error
        self._record("dispatch", start_ns, layer_id)
        return flight

    def combine(self, dispatched: Dispatched) -> Tensor:
        """Wait for the experts and return their weighted sum, [T, D] float32. Raises WorkerLost.

        Replies come in the order of dispatch: those of earlier flights are taken in on the way.
        """
        self._check_open()
        if not isinstance(dispatched, InFlight):
            raise LinkError("these rows were dispatched by another exchange: combine them there")
        start_ns = time.monotonic_ns()
        while dispatched.missing:
            self._take_arrival()
        self._record("wait", start_ns, dispatched.layer_id)
        start_ns = time.monotonic_ns()
        if dispatched.position_of is not None:
            combined = weighted_sum([dispatched.output], dispatched.position_of, dispatched.topk_weights)
        elif dispatched.partials:
            combined = sum_partials(dispatched.partials)
        else:  # no tokens, so that nobody was asked
            combined = torch.zeros(dispatched.num_tokens, self._shape.hidden_size)
        combined = combined.to(self._group.device)
        self._record("combine", start_ns, dispatched.layer_id)
        return combined

    def transports(self) -> list[str]:
        """Per ep_rank, what carries its rows, and why."""
        return [self._group.transport] * len(self._names)

    def last_step_times(self) -> list[list[float]]:
        """Per ep_rank, seconds of the last step: [receive, compute, reply]."""
        return [list(times) for times in self._times]

    def set_deadline_floor(self, floor_s: float) -> None:
        """Give the workers another shortest time to answer, from the next rows on."""
        self._deadline.floor_s = floor_s

    def close(self) -> None:
        """Drop the group; living workers are told, a dead one costs no time."""
        self._end(says_goodbye=True)

    def _header(self, kind: int, ep_rank: int, step: StepHeader) -> wire.Header:
        header = wire.Header(kind, step.term, step.epoch, self._incarnations[ep_rank], step.step_id)
        header.ep_level, header.num_tokens = step.ep_level, step.num_tokens
        return header

    def _rows_headers(self, step: StepHeader, flight: InFlight) -> list[wire.Header]:
        headers = [self._header(wire.ROWS, ep_rank, step) for ep_rank in range(len(self._names))]
        for header in headers:
            header.layer_id, header.micro_batch = flight.layer_id, flight.micro_batch
            header.num_tokens = header.num_rows = flight.num_tokens
        return headers

    def _dispatch_tokens(
        self, step: StepHeader, flight: InFlight, hidden_states: Tensor, slot_keys: Tensor
    ) -> None:
        headers = self._rows_headers(step, flight)
        most_local = self._slots.table(flight.layer_id).most_local
        body = message.pack_tokens(slot_keys, flight.topk_weights, hidden_states, self._shape)
        for ep_rank, header in enumerate(headers):
            header.capacity_bytes, header.first_key = body.numel(), ep_rank * most_local
        self._send_metadata(headers, None)
        self._sends.append(self._group.dispatch.broadcast(body.to(self._group.device)))
        self._expect(flight, headers, [])

    def _dispatch_rows(
        self, step: StepHeader, flight: InFlight, hidden_states: Tensor, slot_keys: Tensor
    ) -> None:
        table = self._slots.table(flight.layer_id)
        sorted_rows = sort_rows(slot_keys, table)
        window = self._window
        if window is not None and window.takes(len(hidden_states), step.round_rows, sorted_rows):
            self._dispatch_by_window(window, step, flight, hidden_states, slot_keys, sorted_rows.counts)
            return
        count_extra_rounds(self.extra, step, sorted_rows)
        quantizer = self._shape.quantizer(flight.layer_id)
        token_of = sorted_rows.token_of.to(hidden_states.device)
        sent = rows_to_send(hidden_states, token_of, quantizer).to(self._group.device)
        flight.position_of = sorted_rows.position_of
        shape = (len(token_of), self._shape.hidden_size)
        flight.output = torch.empty(shape, dtype=self._shape.dtype, device=self._group.sums)
        rounds = cut_rounds(sorted_rows, self._message_rows)
        for index, one in enumerate(rounds):
            headers = self._rows_headers(step, flight)
            for header, (begin, end), num_local in zip(headers, one.parts, table.num_local, strict=True):
                header.round, header.rounds = index, len(rounds)
                header.num_rows, header.num_experts = end - begin, num_local
                header.is_int8 = int(sent.scales is not None)
                header.capacity_bytes = self._shape.sent_bytes([flight.layer_id], end - begin)
            self._send_metadata(headers, one.counts)
            splits = [header.capacity_bytes for header in headers]
            self._sends.append(self._group.dispatch.scatter(sent.body(one.parts), splits))
            self._expect(flight, headers, [begin for begin, _ in one.parts])

    def _dispatch_by_window(
        self,
        window: RouterWindow,
        step: StepHeader,
        flight: InFlight,
        hidden_states: Tensor,
        slot_keys: Tensor,
        counts: Tensor,
    ) -> None:
        headers, table = self._rows_headers(step, flight), self._slots.table(flight.layer_id)
        for header, own, num_local in zip(headers, counts, table.num_local, strict=True):
            header.num_rows, header.num_experts, header.is_window = int(own.sum()), num_local, 1
            header.capacity_bytes = header.num_rows * self._shape.row_bytes
        self._send_metadata(headers, counts)
        replies = window.send(flight.layer_id, hidden_states, slot_keys, table)
        flight.position_of = torch.arange(slot_keys.numel()).view(slot_keys.shape)
        self._post(Request(flight, headers, [], [], flight.output, time.monotonic_ns(), replies), replies)

    def _send_metadata(self, headers: list[wire.Header], counts: Tensor | None) -> None:
        while self._sends and self._sends[0].is_done:
            self._sends.popleft().wait()
        each = [
            message.pack_metadata(header, None if counts is None else counts[ep_rank], self._most_local)
            for ep_rank, header in enumerate(headers)
        ]
        self._sends.append(self._group.metadata.scatter(torch.cat(each), [part.numel() for part in each]))

    def _expect(self, flight: InFlight, headers: list[wire.Header], begins: list[int]) -> None:
        words = [message.reply_words(header, self._shape) for header in headers]
        buffer = torch.empty(sum(words), dtype=torch.int64, device=self._group.device)
        gathered = self._group.combine.gather(buffer, words)
        self._post(Request(flight, headers, begins, words, buffer, time.monotonic_ns()), gathered)

    def _post(self, request: Request, wait: PendingCollective | WindowReplies) -> None:
        self._waits.put(wait)
        if not self._requests:
            self._deadline.waiting_since_ns = request.posted_ns
        self._requests.append(request)
        request.owner.missing += 1
        self._extend()

    def _take_arrival(self) -> None:
        if not self._requests:
            raise LinkError("these rows were dispatched by another exchange: combine them there")
        request = self._requests[0]
        layer_id = request.owner.layer_id
        try:
            error, arrived_ns = self._arrivals.get(timeout=self._deadline.left_s)
        except Empty:
            self._expire(layer_id)
            return
        if error is not None:
            raise self._broken(error, "combine", layer_id) from error
        try:
            parts = self._parts(request)
        except LinkError as failure:
            raise self._broken(failure, "combine", layer_id) from failure
        for ep_rank, part in parts:
            try:
                self._accept(request, ep_rank, part, arrived_ns)
            except MessageError as error:
                raise self._lost(ep_rank, "combine", layer_id, str(error)) from error
        self._requests.popleft()
        request.owner.missing -= 1
        self._deadline.learn(request.most_rows, request.posted_ns, arrived_ns)
        self._extend()

    def _parts(self, request: Request) -> list[tuple[int, Tensor]]:
        """What each worker has sent: its message, or of rows that came through windows all of their tails."""
        if request.replies is None:
            replies = request.buffer.to(self._group.sums)
            return [
                (rank, words.view(torch.uint8)) for rank, words in enumerate(replies.split(request.words))
            ]
        request.owner.output, tails = request.replies.take()
        owners = request.replies.owners
        return [(rank, tails[owners == rank]) for rank in owners.unique().tolist()]

    def _accept(self, request: Request, ep_rank: int, buffer: Tensor, arrived_ns: int) -> None:
        sent, flight = request.headers[ep_rank], request.owner
        is_whole = request.replies is None or bool((buffer == buffer[0]).all())
        header = wire.unpack_header(buffer if request.replies is None else buffer[0])
        if not is_whole or header.kind != wire.REPLY or _place_of(header) != _place_of(sent):
            raise MessageError(f"no reply was expected that looks like {header}")
        shape = (sent.num_rows, self._shape.hidden_size)
        if flight.position_of is None:
            self.extra.passes += header.rounds - 1
            flight.partials.extend(wire.unpack(buffer, header, (shape, torch.float64)))
        elif request.replies is None:
            begin = request.begins[ep_rank]
            rows = wire.unpack(buffer, header, (shape, self._shape.dtype))[0]
            flight.output[begin : begin + sent.num_rows] = rows
        at_worker_ns = header.compute_end_ns - header.received_ns
        times = self._times[ep_rank]
        times[0] += (header.compute_start_ns - header.received_ns) / 1e9
        times[1] += (header.compute_end_ns - header.compute_start_ns) / 1e9
        times[2] += max(arrived_ns - request.posted_ns - at_worker_ns, 0) / 1e9
        add_reply_spans(self._timeline, self._names[ep_rank], header, sent.num_rows)

    def _extend(self) -> None:
        self._deadline.extend(sum(request.most_rows for request in self._requests))

    def _expire(self, layer_id: int) -> None:
        verdict = self._inquire(1)
        if not self._arrivals.empty():
            return  # something came while we asked: look at it first
        if verdict.ep_rank is not None or self._deadline.waited_s > CEILING_S:
            cause = f"no answer within the deadline, {verdict.cause}"
            raise self._lost(verdict.ep_rank or 0, "combine", layer_id, cause)
        self._extend()

    def _broken(self, error: LinkError, phase: str, layer_id: int) -> WorkerLost:
        verdict = self._inquire(DEATH_PROBES)
        return self._lost(verdict.ep_rank or 0, phase, layer_id, f"{error}; {verdict.cause}")

    def _inquire(self, attempts: int) -> Verdict:
        asked = (self._requests[0].asked if self._requests else []) or list(range(len(self._names)))
        ask = self._ask_progress
        if ask is None:
            doubt = f"which worker it was is unknown, this is merely the first of {len(asked)}"
            return Verdict(asked[0], doubt)
        verdict = inquire(lambda index: ask(asked[index]), len(asked), attempts)
        return verdict if verdict.ep_rank is None else Verdict(asked[verdict.ep_rank], verdict.cause)

    def _lost(self, ep_rank: int, phase: str, layer_id: int, cause: str) -> WorkerLost:
        num_bytes = sum(request.num_bytes for request in self._requests)
        waited_s = self._deadline.waited_s if self._requests else 0.0
        self._end(says_goodbye=False)
        return WorkerLost(ep_rank, self._names[ep_rank], layer_id, phase, num_bytes, waited_s, cause)

    def _end(self, says_goodbye: bool) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._waits.put(None)
        if self._window is not None:
            self._window.close()
        is_quiet = says_goodbye and not self._requests
        goodbye = None
        if says_goodbye:
            step = self._step or StepHeader(self._term, 0, 0, 0, 0)
            headers = [self._header(wire.GOODBYE, ep_rank, step) for ep_rank in range(len(self._names))]
            goodbye = [message.pack_metadata(header, None, self._most_local) for header in headers]
        pending: list[Any] = [*self._sends, *self._requests]
        self._sends.clear()
        self._requests.clear()
        release(pending)
        threading.Thread(
            target=self._group.leave, args=(goodbye, is_quiet), name="goodbye", daemon=True
        ).start()

    def _record(self, name: str, start_ns: int, layer_id: int) -> None:
        if self._timeline is not None:
            self._timeline.add(name, start_ns, time.monotonic_ns(), "router", layer_id=layer_id)

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkError("the exchange is closed: connect the next epoch")


def _place_of(header: wire.Header) -> tuple[int, ...]:
    origin = (header.term, header.epoch, header.incarnation, header.step_id)
    return (*origin, header.layer_id, header.micro_batch, header.round)
