"""Which row goes to which expert, and how rows become one sum per token again. Pure functions of tensors.

A slot key says where a slot of a token is computed: worker * M + local index of the expert there.
Shapes: T tokens, K experts per token, R rows, D hidden_size, E experts, W workers, M most experts of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common import int8_rows, native_routing
from common.errors import MessageError
from common.exchange.sent_rows import QuantizeRows
from common.native_floats import NativeFloats, installed
from common.native_routing import NativeRouting, Sorted
from common.replica_choice import replica_of

Layout = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape and dtype of the arrays of a message, one after another."""

BLOCK_ELEMENTS = 1 << 18
"""Products that are summed up at a time: what lies between rows and their sums stays in the cache."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a row is: its length D, how many experts K a token has, and the model's dtype.

    Attributes:
        int8_layers: layers whose rows go to the experts as int8 with a float32 scale each at ep_level 2. All
            else is in the model's dtype: other layers, ep_level 1, and what comes home.
        quantize_rows: what the router makes these with, on the device it computes on.
    """

    hidden_size: int
    num_experts_per_tok: int
    dtype: torch.dtype
    int8_layers: frozenset[int] = frozenset()
    quantize_rows: QuantizeRows = int8_rows.quantize_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the model's dtype."""
        return self.hidden_size * self.dtype.itemsize

    def quantizer(self, layer_id: int) -> QuantizeRows | None:
        """What rows of a layer go through before they leave at ep_level 2; None where they go as they are."""
        return self.quantize_rows if layer_id in self.int8_layers else None

    def sent_layout(self, layer_id: int, num_rows: int) -> Layout:
        """The arrays that bring rows to the experts of a layer at ep_level 2."""
        rows = (num_rows, self.hidden_size)
        if layer_id not in self.int8_layers:
            return ((rows, self.dtype),)
        return ((num_rows,), torch.float32), (rows, torch.int8)

    def sent_bytes(self, layer_ids: Iterable[int], num_rows: int) -> int:
        """Bytes of that in the layer that has most."""
        lengths = (
            sum(math.prod(sizes) * dtype.itemsize for sizes, dtype in self.sent_layout(layer_id, num_rows))
            for layer_id in layer_ids
        )
        return max(lengths, default=0)


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Who computes the experts of one layer.

    Attributes:
        keys_of: [E, most replicas of any expert] int64 slot keys, in ep_rank order; -1 past the last.
        first_keys: [E] int64, the first of each expert.
        num_replicas: [E] int64; 0 where no worker holds the expert.
        num_local: experts per worker.
        most_local: M.
    """

    keys_of: Tensor
    first_keys: Tensor
    num_replicas: Tensor
    num_local: tuple[int, ...]
    most_local: int

    @property
    def has_replicas(self) -> bool:
        """Whether any expert is held by more than one worker."""
        return self.keys_of.shape[1] > 1


@dataclass(frozen=True, slots=True)
class SortedRows:
    """Rows of all tokens sorted by (worker, local expert).

    Attributes:
        token_of: [R] the token of each row.
        position_of: [T, K] the row of each slot.
        counts: [W, M] rows per expert, zero past a worker's own experts.
        ends: for each worker, one past its last row; workers follow one another.
    """

    token_of: Tensor
    position_of: Tensor
    counts: Tensor
    ends: tuple[int, ...]

    def span(self, worker: int) -> tuple[int, int]:
        """First row and one past the last row of a worker."""
        return (self.ends[worker - 1] if worker else 0), self.ends[worker]


@dataclass(frozen=True, slots=True)
class LocalRows:
    """Rows that a worker expands from all tokens at level 1, sorted by local expert.

    Attributes:
        rows: [R, D].
        tokens_per_expert: [E_local].
        position_of: [T, K] the row of each slot, R where the expert lives elsewhere.
        weights: [T, K] float32, 0 where the expert lives elsewhere.
    """

    rows: Tensor
    tokens_per_expert: Tensor
    position_of: Tensor
    weights: Tensor


def layer_table(owners: Sequence[Sequence[int]]) -> LayerTable:
    """Build the table of a layer from the experts of each worker, in their local order."""
    most = max((len(experts) for experts in owners), default=0) or 1
    size = 1 + max((expert for experts in owners for expert in experts), default=-1)
    keys: list[list[int]] = [[] for _ in range(size)]
    for worker, experts in enumerate(owners):
        for local, expert in enumerate(experts):
            keys[expert].append(worker * most + local)
    width = max((len(each) for each in keys), default=0) or 1
    padded = [each + [-1] * (width - len(each)) for each in keys]
    keys_of = torch.tensor(padded, dtype=torch.int64).view(size, width)
    return LayerTable(
        keys_of,
        keys_of[:, 0].contiguous(),
        torch.tensor([len(each) for each in keys], dtype=torch.int64),
        tuple(len(own) for own in owners),
        most,
    )


def place_slots(topk_ids: Tensor, table: LayerTable, row_keys: Tensor | None = None) -> Tensor:
    """The slot keys [T, K] of topk_ids [T, K].

    Args:
        row_keys: [T] int64, what chooses among replicas (common.replica_choice); None: always the first.

    Raises:
        MessageError: an expert that no worker holds was chosen.
    """
    if row_keys is None or not table.has_replicas:
        native = _native_routing_for(topk_ids)
        keys = native.place(topk_ids, table.first_keys) if native is not None else None
        if keys is not None:
            return keys
    size = table.num_replicas.numel()
    if topk_ids.numel() and not 0 <= int(topk_ids.min()) <= int(topk_ids.max()) < size:
        raise MessageError(
            f"experts {int(topk_ids.min())}..{int(topk_ids.max())} were chosen, which no worker holds"
        )
    if row_keys is None or not table.has_replicas:
        keys = table.first_keys[topk_ids] if size else topk_ids
    else:
        replica = replica_of(row_keys.unsqueeze(1), table.num_replicas[topk_ids].clamp(min=1))
        keys = table.keys_of[topk_ids, replica]
    if keys.numel() and int(keys.min()) < 0:
        raise MessageError("an expert was chosen that no worker holds: check the placement")
    return keys


def route_slots(topk_ids: Tensor, table: LayerTable, row_keys: Tensor | None = None) -> SortedRows:
    """Place the slots of topk_ids [T, K] as `place_slots` does, and sort their rows."""
    if row_keys is None or not table.has_replicas:
        native = _native_routing_for(topk_ids)
        sizes = len(table.num_local), table.most_local
        made = native.place_and_sort(topk_ids, table.first_keys, *sizes) if native is not None else None
        if made is not None:
            return _sorted_rows(made)
    return sort_rows(place_slots(topk_ids, table, row_keys), table)


def sort_rows(slot_keys: Tensor, table: LayerTable) -> SortedRows:
    """Sort the slots [T, K] by worker and local expert; within one, by token."""
    native = _native_routing_for(slot_keys)
    made = native.sort(slot_keys, len(table.num_local), table.most_local) if native is not None else None
    if made is not None:
        return _sorted_rows(made)
    keys = slot_keys.reshape(-1)
    order = torch.argsort(keys, stable=True)
    position_of = torch.empty_like(order)
    position_of[order] = torch.arange(order.numel())
    workers = len(table.num_local)
    counts = torch.bincount(keys, minlength=workers * table.most_local).view(workers, table.most_local)
    return SortedRows(
        order // max(slot_keys.shape[1], 1),
        position_of.view(slot_keys.shape),
        counts,
        tuple(counts.sum(1).cumsum(0).tolist()),
    )


def local_of(slot_keys: Tensor, first_key: int, num_local: int) -> Tensor:
    """Local index of each slot's expert, [T, K]; num_local where it lives elsewhere."""
    local = slot_keys - first_key
    return torch.where((local >= 0) & (local < num_local), local, num_local)


def expand_rows(
    hidden: Tensor, slot_keys: Tensor, topk_weights: Tensor, first_key: int, num_local: int
) -> LocalRows:
    """Pick the rows of a worker's own experts from all tokens: hidden [T, D], keys and weights [T, K]."""
    local = local_of(slot_keys, first_key, num_local)
    keys = local.reshape(-1)
    counts = torch.bincount(keys, minlength=num_local + 1)[:num_local]
    num_rows = int(counts.sum())
    order = torch.argsort(keys, stable=True)[:num_rows]
    position_of = torch.full_like(keys, num_rows)
    position_of[order] = torch.arange(num_rows)
    weights = torch.where(local < num_local, topk_weights, 0.0)
    rows = hidden.index_select(0, (order // max(slot_keys.shape[1], 1)).to(hidden.device))
    return LocalRows(rows, counts, position_of.view(slot_keys.shape), weights)


def weighted_sum(parts: Sequence[Tensor], position_of: Tensor, topk_weights: Tensor) -> Tensor:
    """Every token's sum over its slots, [T, D] float32; parts make up the rows [R, D], the rest is [T, K].

    Products are rounded in float32, added in slot order in float64, and the sum is rounded once.
    """
    native = _native_for(parts[0])
    if native is not None:
        return native.sum_slots(parts, position_of, topk_weights, torch.float32)
    rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    num_tokens, top_k = position_of.shape
    total = torch.empty(num_tokens, rows.shape[1], device=rows.device)
    block_tokens = max(BLOCK_ELEMENTS // max(top_k * rows.shape[1], 1), 1)
    for first in range(0, num_tokens, block_tokens):
        block = slice(first, first + block_tokens)
        products = rows[position_of[block]].float() * topk_weights[block].unsqueeze(2)
        wide = torch.zeros(products.shape[0], rows.shape[1], dtype=torch.float64, device=rows.device)
        for product in products.unbind(1):
            wide += product
        total[block] = wide
    return total


def partial_sum(output: Tensor, local: LocalRows) -> Tensor:
    """The part of every token's sum that a worker's own experts give, [T, D] float64; output [R, D]."""
    native = _native_for(output)
    if native is not None:
        return native.sum_slots([output], local.position_of, local.weights, torch.float64)
    num_tokens, top_k = local.position_of.shape
    total = torch.zeros(num_tokens, output.shape[1], dtype=torch.float64, device=output.device)
    for slot in range(top_k):
        position = local.position_of[:, slot]
        tokens = (position < output.shape[0]).nonzero().squeeze(1)
        if tokens.numel():
            # A token stands in a slot once, so that no two rows meet in this addition.
            product = output.index_select(0, position[tokens]).float() * local.weights[tokens, slot, None]
            total.index_add_(0, tokens, product.double())
    return total


def sum_partials(partials: Sequence[Tensor]) -> Tensor:
    """Add partial sums [T, D] float64 in ep_rank order and round once, [T, D] float32."""
    total = partials[0].clone()
    for partial in partials[1:]:
        total += partial
    return total.float()


def _sorted_rows(made: Sorted) -> SortedRows:
    token_of, position_of, counts, ends = made
    return SortedRows(token_of, position_of, counts, tuple(ends.tolist()))


def _native_routing_for(slots: Tensor) -> NativeRouting | None:
    takes = slots.is_cpu and slots.dtype is torch.int64
    return native_routing.installed() if takes else None


def _native_for(rows: Tensor) -> NativeFloats | None:
    """The kernels that give the same bits in one pass, where they are built and take such rows."""
    takes = rows.is_cpu and rows.dtype in (torch.float32, torch.bfloat16)
    return installed() if takes else None
