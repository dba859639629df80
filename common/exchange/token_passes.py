"""ep_level 1 at a worker: the rows of its own experts, expanded a bounded number at a time.

Shapes: T tokens, K experts per token, R rows of a pass, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.exchange.routing import LocalRows, expand_rows, local_of, partial_sum

ExpandRows = Callable[[Tensor, Tensor, Tensor, int, int], LocalRows]


class TokenPasses:
    """All tokens of a message, worked off in passes of at most `pass_rows` rows.

    A pass takes whole tokens, so that every token's sum is added up within one pass: the same bits, whatever
    the bound is.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        slot_keys: Tensor,
        topk_weights: Tensor,
        first_key: int,
        num_local: int,
        pass_rows: int,
        expand: ExpandRows = expand_rows,
    ) -> None:
        """Take all tokens of a router.

        Args:
            hidden_states: [T, D].
            slot_keys: [T, K], as place_slots made them, where sums are to be made.
            topk_weights: [T, K] float32, there too.
            first_key: the key of the worker's first expert in the layer.
            num_local: its experts there.
            pass_rows: most rows of a pass, at least K; 0 takes all at once.
            expand: picks the rows, as expand_rows does.
        """
        self._expand = expand
        self._hidden_states, self._slot_keys, self._topk_weights = hidden_states, slot_keys, topk_weights
        self._first_key, self._num_local = first_key, num_local
        num_rows = (local_of(slot_keys, first_key, num_local) < num_local).sum(dim=1)
        self._spans = cut_tokens(num_rows, pass_rows)
        self._index = 0
        self._local: LocalRows | None = None
        self.total = torch.zeros(hidden_states.shape, dtype=torch.float64, device=slot_keys.device)

    @property
    def num_passes(self) -> int:
        """At least 1."""
        return len(self._spans)

    def expand(self) -> LocalRows:
        """The rows of the pass that is due."""
        begin, end = self._spans[self._index]
        self._local = self._expand(
            self._hidden_states[begin:end],
            self._slot_keys[begin:end],
            self._topk_weights[begin:end],
            self._first_key,
            self._num_local,
        )
        return self._local

    def take(self, output: Tensor) -> bool:
        """Add what the experts made of the rows, [R, D]; whether `total` [T, D] float64 is complete."""
        begin, end = self._spans[self._index]
        if self._local is not None:
            self.total[begin:end] = partial_sum(output.to(self.total.device), self._local)
        self._local = None
        self._index += 1
        return self._index == len(self._spans)


def cut_tokens(num_rows: Tensor, most_rows: int) -> list[tuple[int, int]]:
    """Cut tokens with num_rows [T] rows each into runs of at most `most_rows`, none without a token.

    A token with more rows than that is a run of its own; 0 cuts nothing.
    """
    num_tokens = num_rows.shape[0]
    if most_rows <= 0 or num_tokens == 0:
        return [(0, num_tokens)]
    ends = num_rows.cumsum(0)
    spans = []
    begin = taken = 0
    while begin < num_tokens:
        end = max(int(torch.searchsorted(ends, taken + most_rows, right=True)), begin + 1)
        spans.append((begin, end))
        begin, taken = end, int(ends[end - 1])
    return spans
