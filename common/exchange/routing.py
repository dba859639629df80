"""Which row goes to which expert, and how rows become one sum per token again. Pure functions of tensors.

Shapes: T tokens, K experts per token, R rows, D hidden_size, E experts, W workers, M most experts of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import MessageError


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a row is: its length D, how many experts K a token has, and the model's dtype."""

    hidden_size: int
    num_experts_per_tok: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Of one layer: expert -> worker * M + local index, [E]; and the number of experts per worker."""

    key_of: Tensor
    num_local: tuple[int, ...]
    most_local: int


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
    keys = [-1] * size
    for worker, experts in enumerate(owners):
        for local, expert in enumerate(experts):
            keys[expert] = worker * most + local
    return LayerTable(torch.tensor(keys, dtype=torch.int64), tuple(len(own) for own in owners), most)


def local_table(experts: Sequence[int]) -> Tensor:
    """Expert -> local index, with one entry more: -1, which stands for all larger experts."""
    table = torch.full((2 + max(experts, default=-1),), -1, dtype=torch.int64)
    if experts:
        table[torch.tensor(experts)] = torch.arange(len(experts))
    return table


def sort_rows(topk_ids: Tensor, table: LayerTable) -> SortedRows:
    """Sort the slots of topk_ids [T, K] by worker and local expert; within one, by token.

    Raises:
        MessageError: an expert that no worker holds was chosen.
    """
    flat = topk_ids.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < table.key_of.numel():
        raise MessageError(f"experts {int(flat.min())}..{int(flat.max())} were chosen, which no worker holds")
    keys = table.key_of[flat]
    if keys.numel() and int(keys.min()) < 0:
        raise MessageError("an expert was chosen that no worker holds: check the placement")
    order = torch.argsort(keys, stable=True)
    position_of = torch.empty_like(order)
    position_of[order] = torch.arange(order.numel())
    workers = len(table.num_local)
    counts = torch.bincount(keys, minlength=workers * table.most_local).view(workers, table.most_local)
    ends = tuple(counts.sum(1).cumsum(0).tolist())
    top_k = max(topk_ids.shape[1], 1)
    return SortedRows(order // top_k, position_of.view(topk_ids.shape), counts, ends)


def expand_rows(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, table: Tensor, num_local: int
) -> LocalRows:
    """Pick the rows of a worker's own experts from all tokens: hidden [T, D], ids and weights [T, K]."""
    local = table[topk_ids.clamp(max=table.numel() - 1)]
    is_mine = local >= 0
    keys = torch.where(is_mine, local, num_local).reshape(-1)
    counts = torch.bincount(keys, minlength=num_local + 1)[:num_local]
    num_rows = int(counts.sum())
    order = torch.argsort(keys, stable=True)[:num_rows]
    position_of = torch.full_like(keys, num_rows)
    position_of[order] = torch.arange(num_rows)
    weights = torch.where(is_mine, topk_weights, 0.0)
    rows = hidden[order // max(topk_ids.shape[1], 1)]
    return LocalRows(rows, counts, position_of.view(topk_ids.shape), weights)


def weighted_sum(rows: Tensor, position_of: Tensor, topk_weights: Tensor) -> Tensor:
    """Sum of float32-rounded products in slot order, [T, D] float64; rows [R, D], the rest [T, K]."""
    total = torch.zeros(position_of.shape[0], rows.shape[1], dtype=torch.float64)
    for slot in range(position_of.shape[1]):
        product = rows[position_of[:, slot]].float() * topk_weights[:, slot, None]
        total += product.double()
    return total


def partial_sum(output: Tensor, local: LocalRows) -> Tensor:
    """The part of every token's sum that a worker's own experts give, [T, D] float64; output [R, D]."""
    padded = torch.cat([output, output.new_zeros(1, output.shape[1])])
    return weighted_sum(padded, local.position_of, local.weights)
