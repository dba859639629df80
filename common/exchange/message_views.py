"""The arrays of a link's messages at ep_level 2, as either end looks at them.

Shapes: R rows, D hidden_size, E_local experts a worker holds.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from common.errors import MessageError
from common.exchange import wire
from common.exchange.routing import RowShape

ViewsT = TypeVar("ViewsT")

MOST_KEPT = 512
MOST_KEPT_BYTES = 1 << 19
"""Views of longer messages are not kept: their rows take so long that making a view is nothing beside it."""


class SentViews(NamedTuple):
    """What brings rows to the experts of a layer: [E_local] int64, [R] float32 or None, [R, D]."""

    tokens_per_expert: Tensor
    row_scales: Tensor | None
    rows: Tensor


class ReplyViews(NamedTuple):
    """A reply: all of it, flat, and the rows [R, D] in it."""

    message: Tensor
    output: Tensor


class MessageViews:
    """Makes views of messages; keeps those of short ones where the messages of a link lie in the same places.

    To make them takes as long as all else that an end does about a message of a decode step; to find them
    takes a tenth of that. Views that are kept hold their memory, so that no other has its address meanwhile.
    """

    def __init__(self, shape: RowShape, keeps_memory: bool) -> None:
        """`keeps_memory` is that of the link."""
        self._shape, self._keeps_memory = shape, keeps_memory
        self._sent: dict[tuple[int, ...], SentViews] = {}
        self._replies: dict[tuple[int, ...], ReplyViews] = {}

    def sent(self, buffer: Tensor, header: wire.Header, num_local: int) -> SentViews:
        """The arrays of rows that came, which `check_rows` has let pass. Raises MessageError."""
        num_bytes = header.num_bytes
        # All that the layout depends on, and the length that the layout was found to have.
        key = (buffer.data_ptr(), num_bytes, header.num_rows, num_local, header.is_int8)
        views = self._sent.get(key)
        if views is None:
            layout = self._shape.sent_layout(header.layer_id, header.num_rows)
            counts, *scales, rows = wire.unpack(buffer, header, ((num_local,), torch.int64), *layout)
            views = SentViews(counts, scales[0] if scales else None, rows)
            self._keep(self._sent, key, views, num_bytes)
        return views

    def reply(self, memory: Tensor, num_rows: int) -> ReplyViews:
        """The reply of so many rows, at the front of memory that holds `reply_bytes`."""
        key = (memory.data_ptr(), num_rows)
        views = self._replies.get(key)
        if views is None:
            message = memory[: self.reply_bytes(num_rows)]
            shape = (num_rows, self._shape.hidden_size)
            (output,) = wire.view_arrays(message[wire.HEADER_BYTES :], (shape, self._shape.dtype))
            views = ReplyViews(message, output)
            self._keep(self._replies, key, views, message.numel())
        return views

    def rows_home(self, buffer: Tensor, header: wire.Header, num_rows: int) -> Tensor:
        """The rows [R, D] of a reply that came, to so many that were sent. Raises MessageError."""
        expected = self.reply_bytes(num_rows)
        if header.num_bytes != expected:
            raise MessageError(
                f"a reply of {header.num_bytes} bytes was expected to have {expected}: {header}"
            )
        return self.reply(buffer, num_rows).output

    def reply_bytes(self, num_rows: int) -> int:
        """Length of the reply of so many rows."""
        return wire.HEADER_BYTES + num_rows * self._shape.row_bytes

    def _keep(
        self, kept: dict[tuple[int, ...], ViewsT], key: tuple[int, ...], views: ViewsT, num_bytes: int
    ) -> None:
        if not self._keeps_memory or num_bytes > MOST_KEPT_BYTES:
            return
        if len(kept) >= MOST_KEPT:
            kept.clear()
        kept[key] = views
