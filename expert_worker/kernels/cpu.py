"""The expert worker's operations on a CPU: row-invariant, all experts in one call by the native kernels.

Shapes: R rows, E_local local experts, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common import int8_rows, native_bf16
from common.cpu_linear import linear
from common.native_bf16 import NativeBf16
from common.native_int8 import JoinedExperts
from common.output_memory import output_memory
from common.quantization.w8a8 import Int8Weight
from common.rows import swiglu
from expert_worker.kernels import PackedExperts, PackedInt8Experts, reference
from expert_worker.kernels.reference import expand_rows, join, pack

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


@dataclass(frozen=True, slots=True)
class FusedInt8Experts(PackedInt8Experts):
    """The int8 experts of a layer that one call runs.

    Attributes:
        joined: all of them, as that call reads them.
    """

    joined: JoinedExperts


def experts(
    rows: Tensor,
    row_scales: Tensor | None,
    tokens_per_expert: Tensor,
    packed: PackedExperts,
    on_progress: Callable[[], None] | None = None,
    is_grouped: bool = True,
    out: Tensor | None = None,
) -> Tensor:  # [R, D] -> [R, D]
    """Run every row through its expert; only experts that have rows cost anything."""
    if row_scales is not None:
        rows = (rows.float() * row_scales.unsqueeze(1)).to(packed.down[0].dtype)
    native = _native(rows)
    if is_grouped and native is not None:
        output = native.experts(rows, tokens_per_expert, packed.gate_up, packed.down, out)
        _report(on_progress)
        return output
    output = output_memory(rows, rows.dtype, out)
    first = 0
    for expert, num_rows in enumerate(tokens_per_expert.tolist()):
        if num_rows == 0:
            continue
        own = slice(first, first + num_rows)
        output[own] = _one_expert(rows[own], packed.gate_up[expert], packed.down[expert])
        first = own.stop
        _report(on_progress)
    return output


def _one_expert(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # [R, D] -> [R, D]
    native = _native(rows)
    if native is not None:
        return native.experts(rows, torch.tensor([len(rows)]), [gate_up], [down])
    gate, up = linear(rows, gate_up).chunk(2, dim=-1)
    return linear(swiglu(gate, up), down)


def _native(x: Tensor) -> NativeBf16 | None:
    """Return the native kernel for tensors like this one, where there is one."""
    return native_bf16.installed() if x.dtype == torch.bfloat16 else None


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
        gate_up.append(int8_rows.pack_int8(*both))
        down.append(int8_rows.pack_int8(last.weight, last.scale))
    return _fused(PackedInt8Experts(tuple(gate_up), tuple(down), dtype))


def join_int8(parts: Sequence[PackedInt8Experts]) -> PackedInt8Experts:
    """Put all parts' experts one after another, and together for one call where there is a kernel for it."""
    return _fused(reference.join_int8(parts))


def _fused(packed: PackedInt8Experts) -> PackedInt8Experts:
    joined = int8_rows.join_experts(packed.gate_up, packed.down)
    return packed if joined is None else FusedInt8Experts(packed.gate_up, packed.down, packed.dtype, joined)


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
        rows, row_scales = int8_rows.quantize_rows(rows)
    if is_grouped and isinstance(packed, FusedInt8Experts):
        output = int8_rows.int8_experts(rows, row_scales, tokens_per_expert, packed.joined, packed.dtype, out)
        _report(on_progress)
        return output
    output = output_memory(rows, packed.dtype, out)
    first = 0
    for expert, num_rows in enumerate(tokens_per_expert.tolist()):
        if num_rows == 0:
            continue
        own = slice(first, first + num_rows)
        gate, up = int8_rows.int8_linear(rows[own], row_scales[own], packed.gate_up[expert]).chunk(2, dim=-1)
        hidden, hidden_scales = int8_rows.quantize_rows(swiglu(gate, up))
        output[own] = int8_rows.int8_linear(hidden, hidden_scales, packed.down[expert]).to(packed.dtype)
        first = own.stop
        _report(on_progress)
    return output


def _report(on_progress: Callable[[], None] | None) -> None:
    if on_progress is not None:
        on_progress()


def is_fused(packed: PackedExperts | PackedInt8Experts) -> bool:
    """Whether one call runs all experts: in int8 and in bfloat16, by the native kernels."""
    if isinstance(packed, PackedInt8Experts):
        return isinstance(packed, FusedInt8Experts)
    return any(_native(down) is not None for down in packed.down)


def joined(packed: PackedExperts | PackedInt8Experts) -> JoinedExperts | None:
    """What one call of the native kernels reads, for experts in int8."""
    return packed.joined if isinstance(packed, FusedInt8Experts) else None
