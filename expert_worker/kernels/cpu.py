"""The expert worker's operations on a CPU: row-invariant, one expert after the other.

Shapes: R rows, E_local local experts, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.rows import linear, swiglu
from expert_worker.kernels import PackedExperts
from expert_worker.kernels.reference import pack

__all__ = ["experts", "pack"]


def experts(
    rows: Tensor,
    row_scales: Tensor | None,
    tokens_per_expert: Tensor,
    packed: PackedExperts,
    on_progress: Callable[[], None] | None = None,
) -> Tensor:  # [R, D] -> [R, D]
    """Run every row through its expert; only experts that have rows cost anything."""
    if row_scales is not None:
        rows = (rows.float() * row_scales.unsqueeze(1)).to(packed.down[0].dtype)
    output = torch.empty_like(rows)
    first = 0
    for expert, num_rows in enumerate(tokens_per_expert.tolist()):
        if num_rows == 0:
            continue
        own = slice(first, first + num_rows)
        gate, up = linear(rows[own], packed.gate_up[expert]).chunk(2, dim=-1)
        output[own] = linear(swiglu(gate, up), packed.down[expert])
        first = own.stop
        if on_progress is not None:
            on_progress()
    return output
