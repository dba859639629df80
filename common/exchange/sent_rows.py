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
    """Rows in the order in which workers and their experts take them, which still lie by token.

    Attributes:
        tokens: [T, D], int8 where there are scales.
        scales: [T] float32 where tokens stand for tokens * scales, else None.
        token_of: [R] the token of each row.
    """

    tokens: Tensor
    scales: Tensor | None
    token_of: Tensor

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, with its scale."""
        return self.tokens.shape[1] * self.tokens.itemsize + (0 if self.scales is None else 4)

    def gathered(self) -> tuple[Tensor, Tensor | None]:
        """All rows [R, D], and their scales [R] where they have some."""
        *scales, rows = self.arrays(0, len(self.token_of))
        return rows, scales[0] if scales else None

    def arrays(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """What travels of the rows from `begin` to `end`, as common.exchange.wire wants it ordered."""
        token_of = self.token_of[begin:end]
        # Not tokens[token_of], which on a CPU copies numbers where this copies rows.
        rows = self.tokens.index_select(0, token_of)
        return (rows,) if self.scales is None else (self.scales.index_select(0, token_of), rows)

    def body(self, parts: Sequence[tuple[int, int]]) -> Tensor:
        """The arrays of all parts, one after another, in one flat uint8 tensor."""
        if self.scales is None and sum(end - begin for begin, end in parts) == len(self.token_of):
            return _bytes_of(self.gathered()[0])  # all rows in their order: one copy will do
        return torch.cat([_bytes_of(array) for part in parts for array in self.arrays(*part)])

    def to(self, device: torch.device) -> SentRows:
        """The same rows on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return SentRows(self.tokens.to(device), scales, self.token_of.to(device))


def rows_to_send(hidden_states: Tensor, token_of: Tensor, quantize: QuantizeRows | None) -> SentRows:
    """Prepare the rows of tokens: hidden_states [T, D], token_of [R]; None leaves them in their dtype.

    A token is quantised once, however many experts it goes to: a row's bits depend on nothing but the row.
    """
    if quantize is None:
        return SentRows(hidden_states, None, token_of)
    return SentRows(*quantize(hidden_states), token_of)


def _bytes_of(array: Tensor) -> Tensor:
    return array.reshape(-1).view(torch.uint8)
