"""Int8 arithmetic on CPUs, by oneDNN where it is exact: the bits of the reference, from packed weights.

Shapes: M rows, K in-features, N out-features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from common.int8_reference import (
    EXACT_COLUMNS,
    MAX_INT8,
    PackedInt8,
    int8_product,
    quantize_rows,
    quantize_rows_static,
)

__all__ = ["PackedInt8", "int8_linear", "pack_int8", "quantize_rows", "quantize_rows_static"]

ZERO_POINT = 128
"""oneDNN takes unsigned rows: shifted up by this, whose share it takes off again in int32."""
PACKED_FOR_ROWS = 16
"""Rows a layout is chosen for. One for 16 was as quick for 1 and for 128 as their own, and none slower."""

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[M, K] int8, a packed part, [N] float32 -> float32(sums) * scale, [M, N]."""


def pack_int8(weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> PackedInt8:
    """Lay a weight out for `int8_linear`: [N, K] int8, [N] float32, [N] int32 or None. It may be kept."""
    pack, _ = _layout()
    if bias is None:
        return PackedInt8((pack(weight),), scale, None)
    # Where a bias joins the sums they must still be whole numbers, which float32 holds for so many columns.
    return PackedInt8(tuple(pack(part) for part in weight.split(EXACT_COLUMNS, dim=1)), scale, bias)


def int8_linear(rows: Tensor, row_scales: Tensor | None, packed: PackedInt8) -> Tensor:
    """Multiply int8 rows: [M, K] int8, [M] float32 or None -> [M, N] float32.

    sums = rows x weight + bias in int32, exactly; result = float32(sums) * scale * row_scales, in this order.
    """
    _, product = _layout()
    if packed.bias is None:
        output = product(rows, packed.parts[0], packed.scale)
    else:
        ones = torch.ones_like(packed.scale)
        sums = packed.bias.expand(rows.shape[0], -1).clone()
        for some, part in zip(rows.split(EXACT_COLUMNS, dim=1), packed.parts, strict=True):
            sums += product(some, part, ones).to(torch.int32)
        output = sums.float() * packed.scale
    return output if row_scales is None else output * row_scales.unsqueeze(-1)


@cache
def _layout() -> tuple[Callable[[Tensor], Tensor], Product]:
    """Choose once per process: how a weight is packed, and what multiplies it."""
    return (_pack_onednn, _onednn_product) if _is_onednn_exact() else (_pack_plainly, _plain_product)


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
    output: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, ZERO_POINT, part, scale, no_offsets, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return output


def _pack_plainly(weight: Tensor) -> Tensor:
    return weight.contiguous()


def _plain_product(rows: Tensor, part: Tensor, scale: Tensor) -> Tensor:
    return int8_product(rows, part).float() * scale
