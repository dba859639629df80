"""The expert worker's operations in plain PyTorch: runs everywhere, and is the oracle for every other device.

Shapes: R rows, E_local local experts, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common import int8_reference
from common.exchange.routing import expand_rows
from common.quantization.w8a8 import Int8Weight
from expert_worker.kernels import PackedExperts, PackedInt8Experts

__all__ = [
    "expand_rows",
    "experts",
    "int8_experts",
    "is_fused",
    "join",
    "join_int8",
    "joined",
    "pack",
    "pack_int8",
]


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


def join(parts: Sequence[PackedExperts]) -> PackedExperts:
    """Put all parts' experts one after another; nothing is copied."""
    return PackedExperts(
        tuple(one for part in parts for one in part.gate_up),
        tuple(one for part in parts for one in part.down),
    )


def experts(
    rows: Tensor,
    row_scales: Tensor | None,
    tokens_per_expert: Tensor,
    packed: PackedExperts,
    on_progress: Callable[[], None] | None = None,
    is_grouped: bool = True,
    out: Tensor | None = None,
) -> Tensor:  # [R, D] -> [R, D]
    """Run every row through its expert, one expert after the other."""
    if row_scales is not None:
        rows = (rows.float() * row_scales.unsqueeze(1)).to(packed.down[0].dtype)
    output = torch.empty_like(rows) if out is None else out
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


def pack_int8(
    gate_proj: Iterable[Int8Weight],
    up_proj: Iterable[Int8Weight],
    down_proj: Iterable[Int8Weight],
    dtype: torch.dtype,
) -> PackedInt8Experts:
    """Put every expert's gate_proj on top of its up_proj."""
    gate_up = []
    down = []
    for gate, up, last in zip(gate_proj, up_proj, down_proj, strict=True):
        both = torch.cat([gate.weight, up.weight]), torch.cat([gate.scale, up.scale])
        gate_up.append(int8_reference.pack_int8(*both))
        down.append(int8_reference.pack_int8(last.weight, last.scale))
    return PackedInt8Experts(tuple(gate_up), tuple(down), dtype)


def join_int8(parts: Sequence[PackedInt8Experts]) -> PackedInt8Experts:
    """Put all parts' experts one after another; nothing is copied."""
    return PackedInt8Experts(
        tuple(one for part in parts for one in part.gate_up),
        tuple(one for part in parts for one in part.down),
        parts[0].dtype,
    )


def int8_experts(
    rows: Tensor,
    row_scales: Tensor | None,
    tokens_per_expert: Tensor,
    packed: PackedInt8Experts,
    on_progress: Callable[[], None] | None = None,
    is_grouped: bool = True,
    out: Tensor | None = None,
) -> Tensor:  # [R, D] -> [R, D]
    """Run every row through its expert: quantise, multiply, SwiGLU in float32, quantise, multiply."""
    if row_scales is None:
        rows, row_scales = int8_reference.quantize_rows(rows)
    output = torch.empty(rows.shape, dtype=packed.dtype, device=rows.device) if out is None else out
    first = 0
    for expert, num_rows in enumerate(tokens_per_expert.tolist()):
        if num_rows == 0:
            continue
        own = slice(first, first + num_rows)
        gate, up = int8_reference.int8_linear(rows[own], row_scales[own], packed.gate_up[expert]).chunk(
            2, dim=-1
        )
        hidden, hidden_scales = int8_reference.quantize_rows(F.silu(gate) * up)
        output[own] = int8_reference.int8_linear(hidden, hidden_scales, packed.down[expert]).to(packed.dtype)
        first = own.stop
        if on_progress is not None:
            on_progress()
    return output


def is_fused(packed: PackedExperts | PackedInt8Experts) -> bool:
    """Whether one call runs all experts: never."""
    return False


def joined(packed: PackedExperts | PackedInt8Experts) -> None:
    """No call of the native kernels."""
