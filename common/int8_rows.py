"""Int8 arithmetic on CPUs: by the native kernel where it was built, else by oneDNN where that is exact.

Both give the integers of the reference; the choice is made once per process.
Shapes: M rows, K in-features, N out-features, R rows, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from common import compute_threads, int8_reference, native_int8, native_library
from common.int8_reference import (
    EXACT_COLUMNS,
    MAX_INT8,
    PackedInt8,
    int8_product,
    quantize_rows_static,
)
from common.native_int8 import JoinedExperts, NativeInt8, PackedWeight
from common.rows import swiglu

__all__ = [
    "PackedInt8",
    "int8_experts",
    "int8_linear",
    "int8_mlp",
    "join_experts",
    "pack_int8",
    "quantize_rows",
    "quantize_rows_static",
    "quantizing_linear",
]

logger = logging.getLogger(__name__)

ZERO_POINT = 128
"""oneDNN takes unsigned rows: shifted up by this, whose share it takes off again in int32."""
SLOW_PATH = "portable"
"""The native kernel's path for any processor: exact, and slower than oneDNN."""
PACKED_FOR_ROWS = 16
"""Rows a layout is chosen for. One for 16 was as quick for 1 and for 128 as their own, and none slower."""

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[M, K] int8, a packed part, [N] float32 -> float32(sums) * scale, [M, N]."""


@dataclass(frozen=True, slots=True)
class _Stock:
    """torch's own operators: how a weight is packed, and what multiplies it."""

    pack: Callable[[Tensor], Tensor]
    product: Product


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:  # [M, K] -> [M, K] int8, [M] float32
    """Quantise every row for itself, as the reference does."""
    backend = _backend()
    return backend.quantize_rows(x) if isinstance(backend, NativeInt8) else int8_reference.quantize_rows(x)


def pack_int8(weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> PackedInt8:
    """Lay a weight out for `int8_linear`: [N, K] int8, [N] float32, [N] int32 or None. It may be kept."""
    backend = _backend()
    if isinstance(backend, NativeInt8):
        return backend.pack_int8(weight, scale, bias)
    if bias is None:
        return PackedInt8((backend.pack(weight),), scale, None)
    # Where a bias joins the sums they must still be whole numbers, which float32 holds for so many columns.
    return PackedInt8(tuple(backend.pack(part) for part in weight.split(EXACT_COLUMNS, dim=1)), scale, bias)


def int8_linear(rows: Tensor, row_scales: Tensor | None, packed: PackedInt8) -> Tensor:
    """Multiply int8 rows: [M, K] int8, [M] float32 or None -> [M, N] float32.

    sums = rows x weight + bias in int32, exactly; result = float32(sums) * scale * row_scales, in this order.
    """
    backend = _backend()
    if isinstance(backend, NativeInt8) and isinstance(packed, PackedWeight):
        scales = torch.ones(rows.shape[0]) if row_scales is None else row_scales
        return backend.int8_linear(rows, scales, packed)
    product = backend.product if isinstance(backend, _Stock) else _plain_product
    if packed.bias is None:
        output = product(rows, packed.parts[0], packed.scale)
    else:
        ones = torch.ones_like(packed.scale)
        sums = packed.bias.expand(rows.shape[0], -1).clone()
        for some, part in zip(rows.split(EXACT_COLUMNS, dim=1), packed.parts, strict=True):
            sums += product(some, part, ones).to(torch.int32)
        output = sums.float() * packed.scale
    return output if row_scales is None else output * row_scales.unsqueeze(-1)


def quantizing_linear(x: Tensor, packed: PackedInt8, bias: Tensor | None) -> Tensor:  # [M, K] -> [M, N]
    """Quantise rows, multiply them, add the bias [N] in float32, and round to the dtype of x."""
    backend = _backend()
    if isinstance(backend, NativeInt8) and isinstance(packed, PackedWeight) and bias is None:
        return backend.quantizing_linear(x, packed)
    output = int8_linear(*quantize_rows(x), packed)
    return (output if bias is None else output + bias).to(x.dtype)


def int8_mlp(x: Tensor, gate_up: PackedInt8, down: PackedInt8) -> Tensor:  # [M, D] -> [M, D]
    """Run rows through gate_up [2F, D], SwiGLU in float32, and down [D, F]; round to the dtype of x."""
    backend = _backend()
    if (
        isinstance(backend, NativeInt8)
        and isinstance(gate_up, PackedWeight)
        and isinstance(down, PackedWeight)
    ):
        return backend.mlp(x, gate_up, down)
    gate, up = int8_linear(*quantize_rows(x), gate_up).chunk(2, dim=-1)
    return int8_linear(*quantize_rows(swiglu(gate, up)), down).to(x.dtype)


def join_experts(gate_up: Sequence[PackedInt8], down: Sequence[PackedInt8]) -> JoinedExperts | None:
    """Put a layer's experts together where one call runs them all: gate_up [2F, D] and down [D, F] each."""
    backend = _backend()
    return backend.join_experts(gate_up, down) if isinstance(backend, NativeInt8) and gate_up else None


def int8_experts(
    rows: Tensor,
    row_scales: Tensor,
    tokens_per_expert: Tensor,
    joined: JoinedExperts,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:  # [R, D] int8, [R] float32, [E_local] int64 -> [R, D]
    """Run rows, sorted by expert, through what `join_experts` has put together, in one call, into `out`."""
    backend = _backend()
    if not isinstance(backend, NativeInt8):
        raise TypeError("there is no fused kernel here, so that nothing can have been joined for it")
    return backend.int8_experts(rows, row_scales, tokens_per_expert, joined, dtype, out)


@cache
def _backend() -> NativeInt8 | _Stock:
    why = native_library.why_unavailable()
    if why is None and native_library.available_paths()[-1] != SLOW_PATH:
        return native_int8.load()
    why = why or "the native int8 kernel has no fast path for this processor"
    logger.info("%s; torch's own operators are used", why)
    if _is_onednn_exact():
        return _Stock(_pack_onednn, _onednn_product)
    return _Stock(_pack_plainly, _plain_product)


def _is_onednn_exact() -> bool:
    """Try the largest numbers: without VNNI, x86 adds pairs of products in 16 bits, which overflow."""
    rows = torch.full((5, 64), MAX_INT8, dtype=torch.int8)
    weight = torch.full((16, 64), MAX_INT8, dtype=torch.int8)
    scale = torch.ones(16)
    try:
        found = _onednn_product(rows, _pack_onednn(weight), scale)
    except (AttributeError, RuntimeError):  # this build or processor has no such operator
        return False
    return torch.equal(found, _plain_product(rows, weight, scale))


def _pack_onednn(weight: Tensor) -> Tensor:
    shape = [PACKED_FOR_ROWS, weight.shape[1]]
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), shape)
    return packed


def _onednn_product(rows: Tensor, part: Tensor, scale: Tensor) -> Tensor:
    if not len(rows):
        return torch.empty(0, len(scale))
    unsigned = rows.contiguous().view(torch.uint8) ^ ZERO_POINT  # the same as adding it
    no_offsets = torch.zeros(len(scale), dtype=torch.int64)
    with compute_threads.whole_team():
        output: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, ZERO_POINT, part, scale, no_offsets, None, 1.0, 0, torch.float32, "none", [], ""
        )
    return output


def _pack_plainly(weight: Tensor) -> Tensor:
    return weight.contiguous()


def _plain_product(rows: Tensor, part: Tensor, scale: Tensor) -> Tensor:
    with compute_threads.whole_team():
        return int8_product(rows, part).float() * scale
