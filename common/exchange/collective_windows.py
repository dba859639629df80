"""Rows through windows, beside a group's lanes: npu_attention_to_ffn and npu_ffn_to_attention on Atlas A3.

The router is the attention rank and rank 0, workers are FFN ranks. One micro-batch is under way at a time, so
that nobody writes to what was not read yet: npu_attention_to_ffn would spin on the device until it was.
Layouts: common.npu_windows. Shapes: T tokens, K experts per token, R rows, D hidden_size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import LinkError, MessageError
from common.exchange import wire
from common.exchange.deadline import CEILING_S
from common.exchange.routing import LayerTable, SortedRows
from common.npu_windows import HEAD_WORDS, ROW_ITEM_BYTES, TAIL_COLUMNS, WindowLayout
from common.process_group import first_line, release

logger = logging.getLogger(__name__)

POLL_S = 0.0001
TAIL_BYTES = ROW_ITEM_BYTES * TAIL_COLUMNS
FFN_START_RANK = 1
NOBODY = -1
"""In a worker's table: a slot whose expert is elsewhere."""
ASYNCHRONOUS = 1
"""sync_flag: workers without rows are told nothing, and clear no flag."""

_kept: list[Tensor] = []
"""Windows of lost epochs. A peer that stood still may go on and write there: nothing else may lie there."""


@dataclass(slots=True)
class WindowGroup:
    """A process group that carries nothing but the two operators, with its registered memory.

    Attributes:
        name: as HCCL calls the group.
        memory: this rank's window, uint8.
    """

    group: Any
    name: str
    size: int
    layout: WindowLayout
    memory: Tensor

    def close(self, is_quiet: bool) -> None:
        """Drop the group; `is_quiet`: no peer can still write to the window."""
        owned, self.group = [self.group], None  # no name but the reaper's may keep the group alive
        if owned[0] is None:
            return
        release(owned)
        if not is_quiet:
            _kept.append(self.memory)
            logger.warning("%d bytes of a window are kept: a lost peer may write there", self.memory.numel())


@dataclass(slots=True)
class WindowReplies:
    """The replies to one micro-batch; as a PendingCollective as far as waiting goes.

    Attributes:
        owners: [T * K] on the CPU, the worker of each slot.
        arrived: [T * K] there, which slots were home when they were looked at last.
    """

    window: RouterWindow
    owners: Tensor
    arrived: Tensor

    def wait(self) -> None:
        """Wait until all rows are home. Raises LinkError where the window was closed."""
        while not self._look():
            if self.window.is_closed:
                raise LinkError("the windows are closed: join the next epoch")
            time.sleep(POLL_S)

    def take(self) -> tuple[Tensor, Tensor]:
        """The rows [T * K, D] of all slots on the CPU, and their tails [T * K, TAIL_BYTES] uint8."""
        return self.window.take(len(self.owners))

    @property
    def silent(self) -> list[int]:
        """The workers whose rows are not home yet, as far as that was looked at."""
        return sorted(set(self.owners[~self.arrived].tolist()))

    def _look(self) -> bool:
        try:
            self.arrived = self.window.flags[: len(self.owners)].cpu() == 1
        except RuntimeError as error:
            raise LinkError(f"the windows failed: {first_line(error)}") from error
        return bool(self.arrived.all())


class RouterWindow:
    """The router's end."""

    def __init__(self, group: WindowGroup, dtype: torch.dtype) -> None:
        layout, device = group.layout, group.memory.device
        self.layout, self.is_closed = layout, False
        self._group = group
        self.flags = group.memory[: layout.router_rows_at].view(torch.int32)[: layout.num_slots]
        self._rows = _rows_of(group, layout.router_rows_at, layout.router_columns, dtype)
        self._tables: dict[int, Tensor] = {}
        self._pending: WindowReplies | None = None
        self._x = torch.zeros(1, layout.num_tokens, layout.hidden_size, dtype=dtype, device=device)
        # Tokens that do not take part have experts all the same, and those of a token must differ.
        own = torch.arange(layout.top_k, dtype=torch.int32, device=device)
        self._ids = own.expand(1, layout.num_tokens, layout.top_k).contiguous()
        self._zero = torch.zeros(1, dtype=torch.int32, device=device)

    def takes(self, num_tokens: int, round_rows: int, sorted_rows: SortedRows) -> bool:
        """Whether a micro-batch can go by window now, with at most `round_rows` rows (0: any) to a worker."""
        if self._pending is not None or num_tokens > self.layout.num_tokens:
            return False
        return round_rows <= 0 or int(sorted_rows.counts.sum(1).max()) <= round_rows

    def send(
        self, layer_id: int, hidden_states: Tensor, slot_keys: Tensor, table: LayerTable
    ) -> WindowReplies:
        """Write hidden_states [T, D] to the workers of slot_keys [T, K]. Raises LinkError."""
        layout, num_tokens = self.layout, len(hidden_states)
        try:
            self.flags.zero_()
            self._x[0, :num_tokens].copy_(hidden_states)
            self._ids[0, :num_tokens].copy_(slot_keys.to(torch.int32))
            is_taking_part = torch.arange(layout.num_tokens) < num_tokens
            torch.ops.npu.npu_attention_to_ffn(
                self._x,
                *(self._zero, self._zero, self._zero),  # one router, one micro-batch, one table
                self._ids,
                self._rank_table(layer_id, table),
                self._group.name,
                self._group.size,
                layout.worker_table,
                layout.worker_rows,
                layout.router_flags,
                layout.num_experts,
                active_mask=is_taking_part.unsqueeze(0).to(self._x.device),
                sync_flag=ASYNCHRONOUS,
                ffn_start_rank_id=FFN_START_RANK,
            )
        except RuntimeError as error:
            raise LinkError(f"the windows failed: {first_line(error)}") from error
        owners = (slot_keys // table.most_local).reshape(-1)
        self._pending = WindowReplies(self, owners, torch.zeros(len(owners), dtype=torch.bool))
        return self._pending

    def take(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """The rows and tails of all slots, which are home; the window is free again. Raises LinkError."""
        try:
            whole = self._rows[:num_slots].cpu()
        except RuntimeError as error:
            raise LinkError(f"the windows failed: {first_line(error)}") from error
        self._pending = None
        rows, tails = whole[:, : self.layout.hidden_size], whole[:, self.layout.hidden_size :]
        return rows.contiguous(), tails.contiguous().view(torch.uint8)

    def close(self) -> None:
        """End who waits for replies; the group is closed by who owns it."""
        self.is_closed = True

    def _rank_table(self, layer_id: int, table: LayerTable) -> Tensor:
        if layer_id not in self._tables:
            rows = torch.tensor([[1, FFN_START_RANK, 0]], dtype=torch.int32).repeat(
                self.layout.num_experts, 1
            )
            keys = torch.arange(len(table.num_local) * table.most_local, dtype=torch.int32)
            rows[: len(keys), 1] += keys // table.most_local
            rows[: len(keys), 2] = keys % table.most_local
            self._tables[layer_id] = rows.unsqueeze(0).to(self._x.device)
        return self._tables[layer_id]


class WorkerWindow:
    """A worker's end."""

    def __init__(self, group: WindowGroup, dtype: torch.dtype) -> None:
        layout = group.layout
        self._group, self._layout, self._dtype = group, layout, dtype
        self._table = _table_of(group.memory, layout)
        self._rows = _rows_of(group, layout.worker_rows_at, layout.hidden_size, dtype)
        self.is_awaiting = False
        self._zero = torch.zeros(1, dtype=torch.int32, device=self._table.device)

    def receive(self, counts: Tensor, is_dropped: Callable[[], bool]) -> tuple[Tensor, Tensor]:
        """Wait for the rows that were announced, counts [E_local] of each expert.

        Returns:
            The rows [R, D] sorted by local expert, and their slots [R] on the CPU.

        Raises:
            LinkError: they did not come.
            MessageError: others came than were announced.
        """
        self.is_awaiting = True
        deadline = time.monotonic() + CEILING_S
        try:
            while int(self._table[:1].cpu()) != 1:
                if is_dropped() or time.monotonic() > deadline:
                    raise LinkError(f"the windows failed: no rows came within {CEILING_S:.0f} s")
                time.sleep(POLL_S)
            self.is_awaiting = False
            experts = self._table[HEAD_WORDS:].cpu().long()
            slots = torch.argsort(experts, stable=True)[int((experts < 0).sum()) :]
            found = torch.bincount(experts[slots], minlength=len(counts))
            if not torch.equal(found, counts):
                raise MessageError(f"rows per expert {found.tolist()} came, announced were {counts.tolist()}")
            rows = self._rows.index_select(0, slots.to(self._rows.device))
            _empty(self._table)  # behind the copy, on the same stream
        except RuntimeError as error:
            raise LinkError(f"the windows failed: {first_line(error)}") from error
        return rows, slots

    def pack(self, header: wire.Header, rows: Tensor) -> Tensor:
        """Replies as they travel: rows [R, D] with the header behind each, [R, D + TAIL_COLUMNS]."""
        tail = torch.zeros(TAIL_BYTES, dtype=torch.uint8)
        wire.pack(tail, header)
        return torch.cat([rows, tail.view(self._dtype).to(rows.device).expand(len(rows), -1)], dim=1)

    def send(self, packed: Tensor, slots: Tensor) -> None:
        """Write replies to the slots [R] they answer. Raises LinkError."""
        layout, device = self._layout, packed.device
        zeros = self._zero.expand(len(slots)).contiguous()
        try:
            torch.ops.npu.npu_ffn_to_attention(
                packed,
                *(zeros, zeros),  # one router, one micro-batch
                (slots // layout.top_k).to(device, torch.int32),
                (slots % layout.top_k).to(device, torch.int32),
                torch.tensor([len(slots)], dtype=torch.int64).to(device),
                self._group.name,
                self._group.size,
                layout.router_flags,
                layout.router_rows,
                attn_rank_table=self._zero,
            )
        except RuntimeError as error:
            raise LinkError(f"the windows failed: {first_line(error)}") from error


def register(
    group: Any, rank: int, size: int, layout: WindowLayout, meet: Callable[[bool], bool]
) -> WindowGroup | None:
    """Make this rank's window and let its peers into it; None, at every rank, where any of them cannot.

    Args:
        group: a fresh ProcessGroupHCCL.
        meet: returns once every rank has called it, with whether all of them gave True.

    Raises:
        LinkError: of `meet`.
    """
    windows, why = None, _connect(group)
    # What comes next holds Python's lock until the peers call it too: only once all of them are about to.
    if meet(not why):
        try:
            num_bytes = layout.worker_bytes if rank else layout.router_bytes
            group._window_register_and_exchange(num_bytes, [0] if rank else list(range(1, size)))
            memory = group._get_window_mem().view(torch.uint8)
            if rank:
                _empty(_table_of(memory, layout))
                memory[:1].cpu()  # it is empty before the router hears of it
            windows = WindowGroup(group, str(group.get_hccl_comm_name(rank)), size, layout, memory)
        except (AttributeError, RuntimeError) as error:
            why = first_line(error)
        if meet(windows is not None):
            return windows
    logger.warning("no windows: %s", why or "another rank has none, and its log says why")
    return None


def _connect(group: Any) -> str:
    """Connect all ranks; what went wrong."""
    try:
        current = torch.get_device_module("npu").current_device()
        group.eager_connect_single_device(torch.device("npu", current))
    except (AttributeError, RuntimeError) as error:
        return first_line(error)
    return ""


def _table_of(memory: Tensor, layout: WindowLayout) -> Tensor:
    return memory[: layout.worker_rows_at].view(torch.int32)[: HEAD_WORDS + layout.num_slots]


def _empty(table: Tensor) -> None:
    """Let the router write."""
    table[HEAD_WORDS:].fill_(NOBODY)
    table[:HEAD_WORDS].zero_()  # the flag last


def _rows_of(group: WindowGroup, begin: int, columns: int, dtype: torch.dtype) -> Tensor:
    num_slots = group.layout.num_slots
    end = begin + ROW_ITEM_BYTES * num_slots * columns
    return group.memory[begin:end].view(dtype).view(num_slots, columns)
