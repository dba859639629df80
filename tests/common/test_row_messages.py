"""The rows of each message, written by the native kernel and without it, against a loop over rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from common import int8_reference, native_routing
from common.exchange import wire
from common.exchange.routing import SortedRows, layer_table, route_slots
from common.exchange.row_messages import RowMessages
from common.exchange.sent_rows import SentRows, rows_to_send
from tests.kernels.comparing import THREAD_COUNTS, num_threads, randn

IS_NATIVE = pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])
FORMS = pytest.mark.parametrize("form", [torch.float32, torch.bfloat16, torch.int8], ids=str)
OWNERS = ((4, 0, 7), (), (1,), (6, 3, 2, 5))  # nobody chooses expert 5
TOP_K = 3


@pytest.fixture(autouse=True)
def _chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.getfixturevalue("is_native"):
        monkeypatch.setattr(native_routing, "installed", lambda: None)
    elif native_routing.installed() is None:
        pytest.skip("the native kernels were not built here")


def prepared(hidden: Tensor, form: torch.dtype) -> tuple[SortedRows, SentRows]:
    """Rows of tokens with distinct choices; int8 ones are quantised from `hidden`."""
    generator = torch.Generator().manual_seed(len(hidden))
    order = [torch.randperm(8, generator=generator) for _ in hidden]
    topk_ids = (
        torch.stack([ids[ids != 5][:TOP_K] for ids in order]) if order else torch.empty(0, TOP_K).long()
    )
    rows = route_slots(topk_ids, layer_table(OWNERS))
    quantize = int8_reference.quantize_rows if form == torch.int8 else None
    return rows, rows_to_send(hidden if quantize else hidden.to(form), rows.token_of, quantize)


def assert_written(messages: RowMessages, rows: SortedRows, hidden: Tensor, form: torch.dtype) -> None:
    """Compare all messages with what stands in `hidden`, expert by expert."""
    codes, scales = int8_reference.quantize_rows(hidden)
    expected_rows = codes if form == torch.int8 else hidden.to(form)
    row = 0
    for worker, own in enumerate(OWNERS):
        experts = [local for local in range(len(own)) for _ in range(int(rows.counts[worker, local]))]
        written = 0
        for index in range(messages.rounds[worker]):
            begin, end = messages.span(worker, index)
            assert begin == row
            length = messages.num_bytes(worker, end - begin)
            buffer = torch.full((length + 9,), 0x5A, dtype=torch.uint8)
            messages.write(buffer, worker, begin, end)
            layout: list[tuple[tuple[int, ...], torch.dtype]] = [((len(own),), torch.int64)]
            layout += [((end - begin,), torch.float32)] if form == torch.int8 else []
            layout += [((end - begin, hidden.shape[1]), form)]
            counts, *scale, body = wire.view_arrays(buffer[wire.HEADER_BYTES : length], *layout)
            held = experts[written : written + end - begin]
            assert counts.tolist() == [held.count(local) for local in range(len(own))]
            tokens = rows.token_of[begin:end]
            assert torch.equal(body, expected_rows[tokens])
            assert all(torch.equal(one, scales[tokens]) for one in scale)
            assert set(buffer[: wire.HEADER_BYTES].tolist()) == {0x5A}  # the header is another's to write
            assert set(buffer[length:].tolist()) == {0x5A}
            written, row = written + end - begin, end
        assert written == len(experts)
    assert row == len(rows.token_of)


@IS_NATIVE
@FORMS
@pytest.mark.parametrize("size", [1, 7, 64, 130])
@pytest.mark.parametrize("most_rows", [1, 4, 1000])
def test_each_message_has_its_rows_per_expert_their_scales_and_themselves(
    is_native: bool, form: torch.dtype, size: int, most_rows: int
) -> None:
    num_local = tuple(map(len, OWNERS))
    for num_tokens in (0, 1, 2, 17):
        hidden = randn(num_tokens, num_tokens, size)
        rows, sent = prepared(hidden, form)
        messages = RowMessages(rows, sent, most_rows, num_local)
        spans = [rows.span(worker) for worker in range(len(OWNERS))]
        assert messages.rounds == [-(-(end - begin) // most_rows) for begin, end in spans]
        assert_written(messages, rows, hidden, form)


@IS_NATIVE
@FORMS
def test_many_rows_are_written_alike_by_any_number_of_threads(is_native: bool, form: torch.dtype) -> None:
    hidden = randn(1, 700, 1030)
    rows, sent = prepared(hidden, form)
    for threads, most_rows in itertools.product(THREAD_COUNTS, (800, 5000)):
        with num_threads(threads):
            messages = RowMessages(rows, sent, most_rows, tuple(map(len, OWNERS)))
            assert_written(messages, rows, hidden, form)


@IS_NATIVE
def test_tokens_that_are_a_view_are_read_by_their_strides(is_native: bool) -> None:
    hidden = randn(1, 40, 50)[::2, 1::3]
    rows, sent = prepared(hidden, torch.float32)
    assert not sent.tokens.is_contiguous()
    assert_written(RowMessages(rows, sent, 10, tuple(map(len, OWNERS))), rows, hidden, torch.float32)
