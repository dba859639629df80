"""Rows as they leave the router at ep_level 2: in the model's dtype, or quantised once per token.

Shapes: T tokens, R rows, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QuantizeRows = Callable[[Tensor], tuple[Tensor, Tensor]]
"""[T, D] -> [T, D] int8, [T] float32: every row for itself, as the experts would."""


@dataclass(frozen=True, slots=True)
class SentRows:
    """Rows in the order in which workers and their experts take them.

    Attributes:
        rows: [R, D], int8 where there are scales.
        scales: [R] float32 where rows stand for rows * scales, else None.
    """

    rows: Tensor
    scales: Tensor | None

    def arrays(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """What travels of the rows from `begin` to `end`, as common.exchange.wire wants it ordered."""
        rows = self.rows[begin:end]
        return (rows,) if self.scales is None else (self.scales[begin:end], rows)

    def body(self, parts: Sequence[tuple[int, int]]) -> Tensor:
        """The arrays of all parts, one after another, in one flat uint8 tensor."""
        if self.scales is None and sum(end - begin for begin, end in parts) == len(self.rows):
            return _bytes_of(self.rows)  # all rows in their order: nothing to copy
        return torch.cat([_bytes_of(array) for part in parts for array in self.arrays(*part)])

    def to(self, device: torch.device) -> SentRows:
        """The same rows on another device."""
        return SentRows(self.rows.to(device), None if self.scales is None else self.scales.to(device))


def gather_rows(hidden_states: Tensor, token_of: Tensor, quantize: QuantizeRows | None) -> SentRows:
    """Pick the token of each row: hidden_states [T, D], token_of [R]; None leaves rows in their dtype.

    A token is quantised once, however many experts it goes to: a row's bits depend on nothing but the row.
    """
    # Not hidden_states[token_of], which on a CPU copies numbers where this copies rows.
    if quantize is None:
        return SentRows(hidden_states.index_select(0, token_of), None)
    rows, scales = quantize(hidden_states)
    return SentRows(rows.index_select(0, token_of), scales.index_select(0, token_of))


def _bytes_of(array: Tensor) -> Tensor:
    return array.reshape(-1).view(torch.uint8)
