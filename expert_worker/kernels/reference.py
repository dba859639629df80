"""The expert worker's operations in plain PyTorch: runs everywhere, and is the oracle for every other device.

Shapes: R rows, E_local local experts, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from expert_worker.kernels import PackedExperts


def pack(
    gate_proj: Iterable[Tensor], up_proj: Iterable[Tensor], down_proj: Iterable[Tensor]
) -> PackedExperts:
    """Put every expert's gate_proj on top of its up_proj."""
    gate_up = []
    down = []
    for gate, up, last in zip(gate_proj, up_proj, down_proj, strict=True):
        gate_up.append(torch.cat([gate, up]))
        down.append(last)
    return PackedExperts(tuple(gate_up), tuple(down))


def experts(
    rows: Tensor,
    row_scales: Tensor | None,
    tokens_per_expert: Tensor,
    packed: PackedExperts,
    on_progress: Callable[[], None] | None = None,
) -> Tensor:  # [R, D] -> [R, D]
    """Run every row through its expert, one expert after the other."""
    if row_scales is not None:
        rows = (rows.float() * row_scales.unsqueeze(1)).to(packed.down[0].dtype)
    output = torch.empty_like(rows)
    first = 0
    for expert, num_rows in enumerate(tokens_per_expert.tolist()):
        if num_rows == 0:
            continue
        own = slice(first, first + num_rows)
        gate, up = F.linear(rows[own], packed.gate_up[expert]).chunk(2, dim=-1)
        hidden = (F.silu(gate.float()) * up.float()).to(rows.dtype)
        output[own] = F.linear(hidden, packed.down[expert])
        first = own.stop
        if on_progress is not None:
            on_progress()
    return output
