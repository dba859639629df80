"""Which experts of a layer have rows, where one native call runs them all.

Shapes: R rows, E_local local experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def counted_experts(
    tokens_per_expert: Tensor, num_rows: int, gate_up: Sequence[object], down: Sequence[object]
) -> tuple[list[int], list[int]]:
    """Return the rows of each expert, from [E_local], and the local indices of those that have any.

    Raises:
        ValueError: they are not the rows of these experts.
    """
    counts = tokens_per_expert.tolist()
    if (
        len(counts) != len(gate_up)
        or len(counts) != len(down)
        or sum(counts) != num_rows
        or min(counts, default=0) < 0
    ):
        raise ValueError(
            f"tokens_per_expert {counts} must count {num_rows} rows of {len(gate_up)} experts with "
            f"{len(down)} down projections"
        )
    return counts, [expert for expert, count in enumerate(counts) if count]
