"""Messages of rows over links at ep_level 2: which rows are in which, and what follows the header.

Shapes: R rows, D hidden_size, W workers, E_local experts a worker holds, M most experts of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common import native_routing
from common.exchange import wire
from common.exchange.routing import SortedRows
from common.exchange.sent_rows import SentRows


class RowMessages:
    """The messages that bring all rows of a dispatch to their workers.

    Attributes:
        sent: the rows.
        num_local: experts of each worker.
        rounds: how many messages each worker gets; none where it gets no rows.
    """

    def __init__(
        self, sorted_rows: SortedRows, sent: SentRows, most_rows: int, num_local: tuple[int, ...]
    ) -> None:
        """Cut the rows of each worker into messages of `most_rows`, at least 1; the last has what is left."""
        self.sent, self.num_local = sent, num_local
        self._counts, self._most_rows = sorted_rows.counts, most_rows
        self._spans = [sorted_rows.span(worker) for worker in range(len(num_local))]
        self.rounds = [-(-(end - begin) // most_rows) for begin, end in self._spans]
        self._row_bytes = sent.row_bytes
        is_plain = sent.tokens.is_cpu and all(
            array.is_contiguous() for array in (sent.tokens, sent.scales) if array is not None
        )
        self._native = native_routing.installed() if is_plain else None

    def span(self, worker: int, index: int) -> tuple[int, int]:
        """First row of a message, and one past its last."""
        first, end = self._spans[worker]
        begin = first + index * self._most_rows
        return begin, min(begin + self._most_rows, end)

    def num_bytes(self, worker: int, num_rows: int) -> int:
        """Length of a message with so many rows."""
        return wire.rows_bytes(self.num_local[worker], num_rows, self._row_bytes)

    def write(self, message: Tensor, worker: int, begin: int, end: int) -> None:
        """Write what follows the header: rows per expert [E_local], scales of int8 rows, and the rows."""
        counts, sent, num_local = self._counts, self.sent, self.num_local[worker]
        first, _ = self._spans[worker]
        if self._native is None:
            low, high = begin - first, end - first
            running = counts[worker, :num_local].cumsum(0)
            own = running.clamp(low, high).diff(prepend=torch.tensor([low]))
            wire.write_arrays(message[wire.HEADER_BYTES :], own, *sent.arrays(begin, end))
            return
        self._native.write_rows(
            message.data_ptr() + wire.HEADER_BYTES,
            *(counts, worker, num_local, first, (begin, end), sent.token_of, sent.tokens, sent.scales),
        )
