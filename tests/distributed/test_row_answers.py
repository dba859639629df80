"""Rows that one call answers: the bits of a worker that computes them message by message, and its errors."""

from __future__ import annotations

import ctypes
import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from common import native_library, process_group
from common.errors import LinkError, WorkerLost
from common.exchange import ALL_TO_ALL, Received, StepHeader, link_choice, wire
from common.exchange.links import LinksExpertExchange, LinksRouterExchange
from common.exchange.message_link import MessageLink
from common.exchange.routing import RowShape
from common.native_rows import RowAnswers
from common.placement import Placement, contiguous
from common.process_group import PairLink
from common.quantization.w8a8 import quantize_channels
from expert_worker import step_loop
from expert_worker.experts import LayerExperts
from expert_worker.kernels import cpu
from tests.distributed.fleet_of_threads import EPOCH, HOST, INCARNATION, JOIN_S, TERM, meeting
from tests.distributed.naive import TOKENS, E, K, inputs
from tests.kernels.comparing import randn

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        native_library.why_unavailable() is not None, reason="the native kernels were not built here"
    ),
]
LAYER, FLOAT_LAYER, D, F = 1, 2, 64, 48
WORKERS = 2


def layers_of(rank: int, placement: Placement, dtype: torch.dtype) -> dict[int, LayerExperts]:
    """Experts with weights that depend on their number alone: in int8 in one layer, not in the other."""
    own = placement.experts_of(rank)[LAYER]
    gate, up, down = (
        [randn(100 * expert + part, *shape) / 8 for expert in own]
        for part, shape in enumerate(((F, D), (F, D), (D, F)))
    )
    gate8, up8, down8 = ([*map(quantize_channels, weights)] for weights in (gate, up, down))
    in_int8 = cpu.pack_int8(gate8, up8, down8, dtype)
    in_float = cpu.pack(*([one.to(dtype) for one in weights] for weights in (gate, up, down)))
    return {LAYER: LayerExperts(own, in_int8, cpu), FLOAT_LAYER: LayerExperts(own, in_float, cpu)}


class Workers:
    """Expert workers in threads, over links of a kind, whose computations in Python are recorded."""

    def __init__(self, shape: RowShape, has_answers: bool, kind: str) -> None:
        self.computed: list[tuple[int, int, int]] = []
        self._reasons: queue.Queue[str] = queue.Queue()
        self.progress = [ctypes.c_uint64() for _ in range(WORKERS)]
        self.links: list[MessageLink] = []
        self.theirs: list[MessageLink] = []
        self._store = process_group.open_store(HOST)
        self._ends: list[LinksExpertExchange] = []
        self._threads: list[threading.Thread] = []
        self._is_stopped = threading.Event()
        self.placement = contiguous(E, WORKERS, [LAYER, FLOAT_LAYER])
        for rank in range(WORKERS):
            with ThreadPoolExecutor(1) as pool:
                joined_as_router = pool.submit(
                    link_choice.join_worker, meeting(self._store, f"w{rank}", kind)
                )
                self.theirs.append(link_choice.join_router(meeting(self._store, f"w{rank}", "auto")))
                self.links.append(joined_as_router.result(JOIN_S))
            layers = layers_of(rank, self.placement, shape.dtype)
            joined = {number: layer.joined for number, layer in layers.items() if layer.joined is not None}
            assert [*joined] == [LAYER]
            progress = ctypes.addressof(self.progress[rank])
            answers = RowAnswers(joined, shape.dtype, D, progress) if has_answers else None
            end = LinksExpertExchange(lambda _term, _epoch, reason: self._reasons.put(reason))
            end.add_router(
                *(TERM, EPOCH, INCARNATION, self.theirs[rank], shape),
                *(self.placement.experts_of(rank), answers),
            )
            self._ends.append(end)
            thread = threading.Thread(target=self._serve, args=(rank, layers), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, rank: int, layers: dict[int, LayerExperts]) -> None:
        def compute(received: Received) -> Tensor:
            self.computed.append((rank, received.step_id, received.layer_id))
            experts, counts = layers[received.layer_id], received.tokens_per_expert
            return experts.forward(received.rows, counts, None, received.row_scales, True, received.output)

        step_loop.serve(self._ends[rank], compute, self._is_stopped.is_set)

    def first_reason(self) -> str:
        """Why the first link ended that did; waits for it."""
        return self._reasons.get(timeout=10)

    def close(self) -> None:
        self._is_stopped.set()
        for end in self._ends:
            end.close()
        for thread in self._threads:
            thread.join(5)


@contextmanager
def joined_router(
    shape: RowShape, has_answers: bool, kind: str = "sharedMemory"
) -> Iterator[tuple[LinksRouterExchange, Workers]]:
    workers = Workers(shape, has_answers, kind)
    names = [f"w{rank}" for rank in range(WORKERS)]
    router = LinksRouterExchange(
        *(workers.links, names, workers.placement, shape, TERM, [INCARNATION] * WORKERS), 10.0, None
    )
    try:
        yield router, workers
    finally:
        router.close()
        workers.close()


def shape_of(dtype: torch.dtype) -> RowShape:
    return RowShape(D, K, dtype, frozenset({LAYER}))


@pytest.mark.parametrize("kind", ["links", "sharedMemory"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_answered_in_one_call_have_the_bits_of_rows_computed_message_by_message(
    dtype: torch.dtype, kind: str
) -> None:
    bounds: list[dict[str, int]] = [{}, {"chunk_rows": 7}, {"round_rows": 5}, {"micro_batches": 2}]
    cases = [*itertools.product((2, 1), bounds, TOKENS, (LAYER, FLOAT_LAYER))]
    found: dict[bool, list[Tensor]] = {}
    for has_answers in (False, True):
        with joined_router(shape_of(dtype), has_answers, kind) as (router, workers):
            sums = []
            for step_id, (level, bound, num_tokens, layer_id) in enumerate(cases):
                router.begin(StepHeader(TERM, EPOCH, step_id, level, num_tokens, **bound))  # type: ignore[arg-type]
                given = inputs(num_tokens, dtype, D)
                sent = [
                    router.dispatch(layer_id, part, *given) for part in range(bound.get("micro_batches", 1))
                ]
                sums += [router.combine(one) for one in reversed(sent)]
            found[has_answers] = sums
            in_python = [step_id for _, step_id, layer_id in workers.computed if layer_id == LAYER]
            first = next(at for at, case in enumerate(cases) if case[2] and case[3] == LAYER)
            at_level_2 = [step_id for step_id in in_python if cases[step_id][0] == 2]
            assert (set(at_level_2) == {first}) == has_answers
    assert all(map(torch.equal, found[True], found[False]))
    assert any(one.abs().sum() > 0 for one in found[True])


def test_the_progress_of_a_worker_moves_on_with_every_message_it_answers() -> None:
    with joined_router(shape_of(torch.bfloat16), True) as (router, workers):
        for step_id in range(3):
            router.begin(StepHeader(TERM, EPOCH, step_id, ALL_TO_ALL, 17))
            router.combine(router.dispatch(LAYER, 0, *inputs(17, torch.bfloat16, D)))
            # The first is computed by whoever counts for itself.
            assert [one.value for one in workers.progress] == [2 * step_id] * WORKERS


def test_replies_over_gloo_are_let_go_while_a_step_goes_on() -> None:
    with joined_router(shape_of(torch.bfloat16), True, "links") as (router, workers):
        router.begin(StepHeader(TERM, EPOCH, 0, ALL_TO_ALL, 17))
        for _ in range(30):  # as many layers
            router.combine(router.dispatch(LAYER, 0, *inputs(17, torch.bfloat16, D)))
        assert len(workers.computed) == WORKERS
        for link in workers.theirs:
            assert isinstance(link, PairLink)
            assert len(link._posted) <= 2


def test_rows_per_expert_that_do_not_sum_to_the_rows_end_the_link_with_a_sentence() -> None:
    with joined_router(shape_of(torch.bfloat16), True) as (router, workers):
        router.begin(StepHeader(TERM, EPOCH, 0, ALL_TO_ALL, 17))
        router.combine(router.dispatch(LAYER, 0, *inputs(17, torch.bfloat16, D)))
        num_local = len(workers.placement.experts_of(0)[LAYER])
        header = wire.Header(wire.ROWS, TERM, EPOCH, INCARNATION, 0, LAYER, ep_level=ALL_TO_ALL, num_tokens=1)
        header.num_rows, header.num_experts, header.is_int8 = 2, num_local, 1
        counts = torch.tensor([1] + [0] * (num_local - 1))
        arrays = counts, torch.ones(2), torch.zeros(2, D, dtype=torch.int8)
        workers.links[0].post(wire.pack(workers.links[0].message(1 << 16), header, *arrays))
        rows = [1] + [0] * (num_local - 1)
        assert workers.first_reason() == f"rows per expert {rows} do not sum to 2"


def test_a_worker_without_memory_for_a_reply_ends_the_link_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: int) -> Tensor:
        raise LinkError("no memory can be had")

    given = inputs(17, torch.bfloat16, D)
    with joined_router(shape_of(torch.bfloat16), True) as (router, workers):
        router.begin(StepHeader(TERM, EPOCH, 0, ALL_TO_ALL, 17))
        router.combine(router.dispatch(LAYER, 0, *given))
        monkeypatch.setattr(workers.theirs[0], "message", refuse)
        with pytest.raises(WorkerLost) as caught:
            router.combine(router.dispatch(LAYER, 0, *given))
        assert caught.value.ep_rank == 0
        assert workers.first_reason() == "no memory can be had"


def test_a_message_that_is_changed_after_it_was_looked_at_is_not_answered() -> None:
    placement = contiguous(E, WORKERS, [LAYER, FLOAT_LAYER])
    joined = layers_of(0, placement, torch.bfloat16)[LAYER].joined
    assert joined is not None
    progress = ctypes.c_uint64()
    answers = RowAnswers({LAYER: joined}, torch.bfloat16, D, ctypes.addressof(progress))
    header, arrays = plain_message(answers, joined.num_experts)
    memory, reply = torch.zeros(1 << 14, dtype=torch.uint8), torch.zeros(1 << 12, dtype=torch.uint8)
    message = wire.pack(memory, header, *arrays)
    assert answers.num_rows(message) == 5
    for change in (
        {"num_rows": 20},
        {"num_rows": 4},
        {"layer_id": 1 << 40},
        {"layer_id": 0},
        {"layer_id": -1},
    ):
        wire.write_header(message, replace(header, **change))
        assert not answers.answer(message, 5, 0, reply)
        assert (int(reply.sum()), progress.value) == (0, 0)
    wire.write_header(message, header)
    assert answers.answer(message, 5, 0, reply)
    assert (wire.unpack_header(reply).num_rows, progress.value) == (5, 2)


def plain_message(answers: RowAnswers, num_local: int) -> tuple[wire.Header, tuple[Tensor, ...]]:
    """The header of rows that `answers` takes, and what follows it."""
    step = wire.Header(wire.STEP, 1, 2, 3, 4, ep_level=ALL_TO_ALL, num_tokens=9, micro_batches=2)
    answers.begin(step)
    header = wire.Header(wire.ROWS, 1, 2, 3, 4, LAYER, ep_level=ALL_TO_ALL, num_tokens=9, num_rows=5)
    header.is_int8, header.num_experts = 1, num_local
    counts = torch.tensor([5] + [0] * (num_local - 1))
    return header, (counts, torch.ones(5), torch.zeros(5, D, dtype=torch.int8))


WRONG = {
    "kind": wire.STEP,
    "term": 2,
    "epoch": 1,
    "incarnation": 4,
    "step_id": 3,
    "layer_id": FLOAT_LAYER,
    "micro_batch": 2,
    "round": -1,
    "ep_level": 1,
    "num_tokens": 10,
    "num_rows": 4,
    "num_experts": 3,
    "is_int8": 0,
    "is_window": 1,
}


@pytest.mark.parametrize("field", WRONG)
def test_a_message_that_is_not_of_the_step_is_left_to_the_caller(field: str) -> None:
    placement = contiguous(E, WORKERS, [LAYER, FLOAT_LAYER])
    joined = layers_of(0, placement, torch.bfloat16)[LAYER].joined
    assert joined is not None
    answers = RowAnswers({LAYER: joined}, torch.bfloat16, D, ctypes.addressof(ctypes.c_uint64()))
    header, arrays = plain_message(answers, joined.num_experts)
    assert field in {one.name for one in fields(wire.Header)}
    memory = torch.zeros(1 << 12, dtype=torch.uint8)
    assert answers.num_rows(wire.pack(memory, header, *arrays)) == 5
    assert answers.num_rows(wire.pack(memory, replace(header, **{field: WRONG[field]}), *arrays)) is None


def test_a_message_that_is_cut_short_or_of_no_known_layer_is_left_to_the_caller() -> None:
    joined = layers_of(0, contiguous(E, WORKERS, [LAYER, FLOAT_LAYER]), torch.bfloat16)[LAYER].joined
    assert joined is not None
    answers = RowAnswers({LAYER: joined}, torch.bfloat16, D, ctypes.addressof(ctypes.c_uint64()))
    header, arrays = plain_message(answers, joined.num_experts)
    message = wire.pack(torch.zeros(1 << 12, dtype=torch.uint8), header, *arrays)
    for num_bytes in (0, wire.HEADER_BYTES - 1, wire.HEADER_BYTES, message.numel() - 1):
        assert answers.num_rows(message[:num_bytes]) is None
    for layer_id in (-1, 0, LAYER + 1, 1 << 40):
        other = wire.pack(
            torch.zeros(1 << 12, dtype=torch.uint8), replace(header, layer_id=layer_id), *arrays
        )
        assert answers.num_rows(other) is None
    huge = wire.pack(torch.zeros(1 << 12, dtype=torch.uint8), replace(header, num_rows=1 << 61), *arrays)
    assert answers.num_rows(huge) is None
