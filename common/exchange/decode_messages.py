"""The messages of a decode step's rows, all workers' written by one native call where there is one.

Shapes: T tokens, K experts per token, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common import int8_rows, native_library
from common.exchange import ALL_TO_ALL, StepHeader, wire
from common.exchange.message_link import MessageLink
from common.exchange.routing import RowShape
from common.exchange.slot_tables import SlotTables, message_rows
from common.native_rows import RowWriter

MOST_BYTES = 1 << 19
"""Room for one message, which must be enough for all rows, whichever workers they are for."""
MOST_FRONTS = 512
"""Views of messages that are kept: those of decode steps have few lengths, in few places."""

Written = tuple[int, tuple[Tensor, int, int]]
"""A worker's ep_rank, and the message to it: itself, the first of its rows, and how many it has."""
Room = Callable[[int, int, int], Tensor]
"""Memory for a message to ep_rank, of so many bytes, with rows of layer_id."""


class DecodeMessages:
    """Writes int8 rows of few tokens into the memory of links that keep it."""

    def __init__(self, num_workers: int, slots: SlotTables, shape: RowShape, room: Room) -> None:
        """Raises ConfigError where the kernels were not built. `room` is where messages are written."""
        self._shape, self._room = shape, room
        # Where experts have replicas, the row chooses among them.
        self._tables = {
            layer_id: table
            for layer_id, table in slots.tables.items()
            if layer_id in shape.int8_layers and not table.has_replicas
        }
        self._writer = RowWriter(self._tables, shape.num_experts_per_tok, shape.hidden_size, num_workers)
        self._spare: list[Tensor | None] = [None] * num_workers
        self._fronts: dict[tuple[int, int], Tensor] = {}
        self._row_bytes = shape.hidden_size + torch.float32.itemsize
        self._most_in_room = (MOST_BYTES - wire.rows_bytes(slots.most_local, 0, 0)) // self._row_bytes
        self._most_rows = 0

    @classmethod
    def open(
        cls, links: Sequence[MessageLink], slots: SlotTables, shape: RowShape, room: Room
    ) -> DecodeMessages | None:
        """Such a writer; None where these links, rows or this machine are none for it."""
        is_usual = shape.quantize_rows is int8_rows.quantize_rows and shape.dtype in (
            torch.bfloat16,
            torch.float32,
        )
        can = is_usual and all(link.keeps_memory for link in links)
        return (
            cls(len(links), slots, shape, room) if can and native_library.why_unavailable() is None else None
        )

    def begin(self, step: StepHeader, headers: Sequence[wire.Header]) -> None:
        """Take a step, and the header of its rows to each worker."""
        most_rows = message_rows(step, self._shape.num_experts_per_tok)
        self._most_rows = min(most_rows, self._most_in_room) if step.ep_level == ALL_TO_ALL else 0
        self._writer.begin(headers)

    def write(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor
    ) -> tuple[list[Written], Tensor] | None:
        """The messages for hidden_states [T, D] and topk_ids [T, K], and the row of each slot [T, K].

        None where they are not written here: rows that are many, or not plainly on the CPU, and experts that
        no worker holds. Raises what `room` does.
        """
        num_rows = topk_ids.numel()
        if (
            layer_id not in self._tables
            or not 0 < num_rows <= self._most_rows
            or not _is_plain(hidden_states, self._shape.dtype, (len(topk_ids), self._shape.hidden_size))
            or not _is_plain(topk_ids, torch.int64, (len(topk_ids), self._shape.num_experts_per_tok))
        ):
            return None
        memory = [self._memory(ep_rank, layer_id) for ep_rank in range(len(self._spare))]
        made = self._writer.write(layer_id, micro_batch, hidden_states, topk_ids, memory)
        if made is None:
            return None
        ends, position_of = made
        written: list[Written] = []
        begin = 0
        for ep_rank, end in enumerate(ends):
            if end > begin:
                num_local = self._tables[layer_id].num_local[ep_rank]
                num_bytes = wire.rows_bytes(num_local, end - begin, self._row_bytes)
                message = self._front(memory[ep_rank], num_bytes)
                written.append((ep_rank, (message, begin, end - begin)))
                self._spare[ep_rank] = None
            begin = end
        return written, position_of

    def _memory(self, ep_rank: int, layer_id: int) -> Tensor:
        """Room for a message; what the last one did not need, having no rows, is used first."""
        memory = self._spare[ep_rank]
        if memory is None:
            self._spare[ep_rank] = memory = self._room(ep_rank, MOST_BYTES, layer_id)
        return memory

    def _front(self, memory: Tensor, num_bytes: int) -> Tensor:
        key = memory.data_ptr(), num_bytes
        front = self._fronts.get(key)
        if front is None:
            if len(self._fronts) >= MOST_FRONTS:
                self._fronts.clear()
            self._fronts[key] = front = memory[:num_bytes]
        return front


def _is_plain(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()
