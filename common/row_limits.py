"""How many rows a worker may be sent, or may hold, at once: pure functions of the tokens of a micro-batch.

MindIE's parameters of expert parallelism with their meaning here: what does not fit takes another round or
pass, and none of it is dropped. T tokens of the micro-batch, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_ROUND_ROWS = 64
"""A receive buffer is never smaller, unless all rows there can be are fewer."""

DEFAULT_BUFFER_FACTORS: tuple[tuple[int, float], ...] = (
    (1048576, 1.32),
    (524288, 1.4),
    (262144, 1.53),
    (131072, 1.8),
    (32768, 3.0),
    (8192, 5.2),
    (0, 8.0),
)
"""The table in the documentation of the feature."""


@dataclass(frozen=True, slots=True)
class RowLimits:
    """The operator's choice, for one group.

    Attributes:
        num_experts_per_tok: K.
        moe_ep: expert workers in the group.
        buffer_factors: alltoall_ep_buffer_scale_factors, strictly descending by tokens (ep_level 2).
        cutoff_factor: topk_scaling_factor where enable_init_routing_cutoff is on, else None (ep_level 1).
        cutoff_min_rows: ExpertMesh.cutoffMinRows.
    """

    num_experts_per_tok: int
    moe_ep: int
    buffer_factors: tuple[tuple[int, float], ...] = DEFAULT_BUFFER_FACTORS
    cutoff_factor: float | None = None
    cutoff_min_rows: int = 4096

    def round_rows(self, num_tokens: int) -> int:
        """Rows that one worker can be sent in one round at ep_level 2: ceil(T * K * factor / moe_ep).

        The factor is that of the first entry with T >= its tokens; below the last entry, the last factor.
        """
        rows = num_tokens * self.num_experts_per_tok
        factor = next(
            (factor for tokens, factor in self.buffer_factors if num_tokens >= tokens),
            self.buffer_factors[-1][1],
        )
        scaled = math.ceil(rows * factor / self.moe_ep)
        return max(min(scaled, rows), min(rows, LEAST_ROUND_ROWS), 1)

    def pass_rows(self, num_tokens: int) -> int:
        """Rows that a worker may expand at once at ep_level 1: ceil(T * K * factor), all without a cutoff.

        Never fewer than K: a pass takes whole tokens.
        """
        rows = num_tokens * self.num_experts_per_tok
        if self.cutoff_factor is None:
            return max(rows, 1)
        bound = max(math.ceil(rows * self.cutoff_factor), self.cutoff_min_rows)
        return max(min(bound, rows), self.num_experts_per_tok)
