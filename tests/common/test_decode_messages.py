"""Messages of a decode step, all written at once: byte for byte those that are written worker by worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common import int8_reference, int8_rows, native_library
from common.exchange import ALL_GATHER, ALL_TO_ALL, StepHeader, wire
from common.exchange.decode_messages import MOST_BYTES, DecodeMessages
from common.exchange.routing import RowShape
from common.exchange.row_messages import RowMessages
from common.exchange.sent_rows import rows_to_send
from common.exchange.slot_tables import SlotTables
from common.placement import Placement
from tests.kernels.comparing import randn

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None, reason="the native kernels were not built here"
)
LAYER, FLOAT_LAYER, DOUBLED_LAYER = 1, 2, 4
OWNERS = ((4, 0, 7), (), (1,), (6, 3, 2, 5))
PLACEMENT = Placement(
    {LAYER: OWNERS, FLOAT_LAYER: OWNERS, DOUBLED_LAYER: ((4, 0, 7), (1,), (1,), (6, 3, 2, 5))}
)
K, D = 3, 40
SHAPE = RowShape(D, K, torch.bfloat16, frozenset({LAYER, DOUBLED_LAYER}))
STEP = StepHeader(2, 3, 5, ALL_TO_ALL, 64, micro_batches=2)
HEADERS = [
    wire.Header(wire.ROWS, 2, 3, 70 + rank, 5, ep_level=ALL_TO_ALL, num_tokens=64)
    for rank in range(len(OWNERS))
]


class Memories:
    """Hands out memory full of what is no message, and counts it."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def __call__(self, ep_rank: int, num_bytes: int, _: int) -> Tensor:
        self.taken.append(ep_rank)
        return torch.full((num_bytes,), 0x5A, dtype=torch.uint8)


def opened(shape: RowShape = SHAPE, step: StepHeader = STEP) -> tuple[DecodeMessages, Memories]:
    memories = Memories()
    messages = DecodeMessages(len(OWNERS), SlotTables(PLACEMENT), shape, memories)
    messages.begin(step, HEADERS)
    return messages, memories


def chosen(num_tokens: int, of: Sequence[int] = range(8)) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    picked = [torch.tensor(of)[torch.randperm(len(of), generator=generator)[:K]] for _ in range(num_tokens)]
    return torch.stack(picked)


def one_by_one(hidden: Tensor, topk_ids: Tensor, micro_batch: int) -> tuple[dict[int, Tensor], Tensor]:
    """The messages by ep_rank, written by what writes those of prompts, and the row of each slot."""
    slots = SlotTables(PLACEMENT)
    rows = slots.route(LAYER, 0, topk_ids)
    sent = rows_to_send(hidden, rows.token_of, int8_reference.quantize_rows)
    messages = RowMessages(rows, sent, 10_000, slots.table(LAYER).num_local)
    made = {}
    for rank in range(len(OWNERS)):
        begin, end = rows.span(rank)
        if end == begin:
            continue
        message = torch.zeros(messages.num_bytes(rank, end - begin), dtype=torch.uint8)
        header = replace(HEADERS[rank], layer_id=LAYER, micro_batch=micro_batch, num_tokens=len(hidden))
        header.num_rows, header.num_experts, header.is_int8 = end - begin, len(OWNERS[rank]), 1
        wire.write_header(message, header)
        messages.write(message, rank, begin, end)
        made[rank] = message
    return made, rows.position_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 64])
def test_all_messages_at_once_have_the_bytes_of_one_after_another(
    num_tokens: int, dtype: torch.dtype
) -> None:
    messages, _ = opened(RowShape(D, K, dtype, SHAPE.int8_layers))
    for micro_batch, seed in ((0, 1), (1, 2)):
        hidden, topk_ids = randn(seed, num_tokens, D).to(dtype), chosen(num_tokens)
        made = messages.write(LAYER, micro_batch, hidden, topk_ids)
        assert made is not None
        written, position_of = made
        expected, expected_position_of = one_by_one(hidden, topk_ids, micro_batch)
        assert torch.equal(position_of, expected_position_of)
        assert {rank for rank, _ in written} == set(expected)
        first = 0
        for rank, (message, begin, num_rows) in written:
            assert torch.equal(message, expected[rank])
            assert (begin, wire.unpack_header(message).num_rows) == (first, num_rows)
            first += num_rows
        assert first == topk_ids.numel()


def test_memory_of_a_worker_without_rows_is_used_for_its_next_message() -> None:
    messages, memories = opened()
    hidden = randn(1, 4, D).bfloat16()
    for ids in ((6, 3, 2, 5), (6, 3, 2, 5), (4, 0, 7)):
        assert messages.write(LAYER, 0, hidden, chosen(4, ids)) is not None
    assert memories.taken == [0, 1, 2, 3, 3, 3]  # only worker 3's memory was sent away before the last


def test_what_it_is_not_for_is_left_to_the_caller() -> None:
    messages, _ = opened()
    hidden, topk_ids = randn(1, 4, D).bfloat16(), chosen(4)
    assert messages.write(FLOAT_LAYER, 0, hidden, topk_ids) is None
    assert messages.write(DOUBLED_LAYER, 0, hidden, topk_ids) is None  # the row chooses the replica
    assert messages.write(LAYER, 0, hidden.t().contiguous().t(), topk_ids) is None
    assert messages.write(LAYER, 0, hidden[:0], topk_ids[:0]) is None
    assert messages.write(LAYER, 0, hidden.double(), topk_ids) is None
    assert messages.write(LAYER, 0, hidden, topk_ids.int()) is None
    assert messages.write(LAYER, 0, hidden, topk_ids[:3]) is None
    assert messages.write(LAYER, 0, hidden, topk_ids.view(6, 2)) is None
    assert messages.write(LAYER, 0, hidden[:, :-1].contiguous(), topk_ids) is None
    assert messages.write(LAYER, 0, hidden, topk_ids + 1) is None  # 8 is nobody's: the caller says so
    assert messages.write(LAYER, 0, hidden, topk_ids) is not None


def test_more_rows_than_one_message_may_have_or_hold_are_left_to_the_caller() -> None:
    hidden, topk_ids = randn(1, 4, D).bfloat16(), chosen(4)
    for bound in ({"chunk_rows": 11}, {"round_rows": 11}):
        assert opened(step=replace(STEP, **bound))[0].write(LAYER, 0, hidden, topk_ids) is None  # type: ignore[arg-type]
    assert opened(step=replace(STEP, chunk_rows=12))[0].write(LAYER, 0, hidden, topk_ids) is not None
    assert opened(step=replace(STEP, ep_level=ALL_GATHER))[0].write(LAYER, 0, hidden, topk_ids) is None
    most = (MOST_BYTES - wire.HEADER_BYTES - 8 * len(OWNERS[3])) // (D + 4) // K
    messages, _ = opened(step=replace(STEP, num_tokens=most + 1))
    for num_tokens, is_taken in ((most, True), (most + 1, False)):
        found = messages.write(LAYER, 0, randn(1, num_tokens, D).bfloat16(), chosen(num_tokens))
        assert (found is not None) == is_taken


class Link:
    """As much of a link as `open` looks at."""

    def __init__(self, keeps_memory: bool) -> None:
        self.keeps_memory = keeps_memory


@pytest.mark.parametrize(
    ("keeps_memory", "shape", "is_open"),
    [
        (True, SHAPE, True),
        (False, SHAPE, False),
        (True, replace(SHAPE, dtype=torch.float16), False),
        (True, replace(SHAPE, quantize_rows=int8_reference.quantize_rows), False),
        (True, replace(SHAPE, quantize_rows=int8_rows.quantize_rows), True),
    ],
)
def test_it_is_for_links_that_keep_memory_and_rows_that_the_kernels_quantise(
    keeps_memory: bool, shape: RowShape, is_open: bool
) -> None:
    links = [Link(True)] * 3 + [Link(keeps_memory)]
    found = DecodeMessages.open(links, SlotTables(PLACEMENT), shape, Memories())  # type: ignore[arg-type]
    assert (found is not None) == is_open
