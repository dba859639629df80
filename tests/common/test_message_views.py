"""Views of messages: found again in the same place, and never taken for those of another message."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.errors import MessageError
from common.exchange import ALL_TO_ALL, message_views, wire
from common.exchange.message_views import MessageViews
from common.exchange.routing import RowShape

LAYER, OTHER_LAYER, D, LOCAL = 1, 2, 16, 3
SHAPE = RowShape(D, 2, torch.bfloat16, frozenset({LAYER}))


def sent(memory: Tensor, layer_id: int, num_rows: int, first: int) -> tuple[Tensor, wire.Header]:
    """A message whose numbers begin at `first`, and its header."""
    header = wire.Header(wire.ROWS, 1, 1, 1, 1, layer_id, ep_level=ALL_TO_ALL, num_rows=num_rows)
    header.is_int8 = int(layer_id == LAYER)
    counts = torch.tensor([num_rows, 0, 0])
    rows = torch.arange(first, first + num_rows * D).view(num_rows, D)
    arrays = (
        (torch.arange(num_rows) + float(first), rows.to(torch.int8))
        if header.is_int8
        else (rows.to(SHAPE.dtype),)
    )
    return wire.pack(memory, header, counts, *arrays), header


@pytest.mark.parametrize("keeps_memory", [False, True])
def test_views_show_what_lies_in_the_message_now(keeps_memory: bool) -> None:
    views = MessageViews(SHAPE, keeps_memory)
    memories = [torch.zeros(1 << 12, dtype=torch.uint8) for _ in range(2)]
    found = []
    for first in range(24):
        layer_id = LAYER if first % 3 else OTHER_LAYER
        message, header = sent(memories[first % 2], layer_id, first % 4, first)
        counts, scales, rows = views.sent(message, header, LOCAL)
        assert counts.tolist() == [first % 4, 0, 0]
        assert rows.dtype == (torch.int8 if layer_id == LAYER else SHAPE.dtype)
        assert rows.flatten().tolist() == [*range(first, first + first % 4 * D)]
        assert (scales is not None) == (layer_id == LAYER)
        if scales is not None:
            assert scales.tolist() == [*range(first, first + first % 4)]
        found.append(rows)
    assert (found[11] is found[23]) == keeps_memory


def test_a_message_of_another_length_is_refused_where_one_was_found_before() -> None:
    views, memory = MessageViews(SHAPE, True), torch.zeros(1 << 12, dtype=torch.uint8)
    message, header = sent(memory, LAYER, 2, 0)
    views.sent(message, header, LOCAL)
    header.num_bytes -= 1
    with pytest.raises(MessageError, match="was expected to have"):
        views.sent(message, header, LOCAL)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_a_reply_is_read_as_it_was_written(num_rows: int) -> None:
    views, memory = MessageViews(SHAPE, True), torch.zeros(1 << 12, dtype=torch.uint8)
    for first in (0, 100):
        message, output = views.reply(memory, num_rows)
        output.copy_(torch.arange(first, first + num_rows * D).view(num_rows, D))
        wire.write_header(message, wire.Header(wire.REPLY, 1, 1, 1, 1, num_rows=num_rows))
        header = wire.unpack_header(message)
        assert header.num_bytes == views.reply_bytes(num_rows)
        (rows,) = wire.unpack(message, header, ((num_rows, D), SHAPE.dtype))
        assert rows.flatten().tolist() == [*range(first, first + num_rows * D)]
        assert torch.equal(MessageViews(SHAPE, True).rows_home(message, header, num_rows), rows)
        with pytest.raises(MessageError, match="was expected to have"):
            views.rows_home(message, header, num_rows + 1)
    assert views.reply(memory, num_rows) is views.reply(memory, num_rows)


def test_no_more_is_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_views, "MOST_KEPT", 3)
    monkeypatch.setattr(message_views, "MOST_KEPT_BYTES", 1000)
    views, memory = MessageViews(SHAPE, True), torch.zeros(1 << 12, dtype=torch.uint8)
    first, *_, last = [views.reply(memory, num_rows) for num_rows in (1, 2, 3, 4)]
    assert views.reply(memory, 4) is last
    assert views.reply(memory, 1) is not first  # it was let go
    assert views.reply(memory, 100) is not views.reply(memory, 100)
