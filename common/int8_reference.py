"""Int8 arithmetic in plain PyTorch: exact integer sums on every machine, scales in float32.

Shapes: M rows, K in-features, N out-features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_INT8 = 127
EXACT_COLUMNS = 1024
"""In-features whose sum float32 holds exactly in any order: 1024 products of at most 2**14 make 2**24."""


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """A weight that stays int8 in memory, laid out by the module whose `int8_linear` takes it.

    Attributes:
        parts: the weight, cut along its in-features where the layout needs it; together they hold it once.
        scale: [N] float32, of every out-feature.
        bias: [N] int32, added to the integer sums; or None.
    """

    parts: tuple[Tensor, ...]
    scale: Tensor
    bias: Tensor | None


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:  # [M, K] -> [M, K] int8, [M] float32
    """Quantise every row for itself: scale = max|x| / 127, rows = round(x / scale), halves to even.

    Both divisions are in float32. A row of zeros has scale 0. So do torch_npu's npu_dynamic_quant and
    msModelSlim's dynamic activations.
    """
    wide = x.float()
    scales = wide.abs().amax(dim=-1) / MAX_INT8
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(-1)
    # The bound matters only where max|x| / 127 is subnormal, and then has few bits.
    rows = torch.round(wide / divisors).clamp_(-MAX_INT8, MAX_INT8)
    return rows.to(torch.int8), scales


def quantize_rows_static(x: Tensor, scale: float, offset: float) -> Tensor:  # [M, K] -> [M, K] int8
    """Quantise all rows alike: round(x / scale) + offset, halves to even, bounded to int8."""
    return (torch.round(x.float() / scale) + offset).clamp_(-MAX_INT8 - 1, MAX_INT8).to(torch.int8)


def pack_int8(weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> PackedInt8:
    """Keep the weight as it is: [N, K] int8, [N] float32, [N] int32 or None."""
    return PackedInt8((weight,), scale, bias)


def int8_linear(rows: Tensor, row_scales: Tensor | None, packed: PackedInt8) -> Tensor:
    """Multiply int8 rows: [M, K] int8, [M] float32 or None -> [M, N] float32.

    sums = rows x weight + bias in int32, exactly; result = float32(sums) * scale * row_scales, in this order.
    """
    sums = int8_product(rows, packed.parts[0])
    if packed.bias is not None:
        sums += packed.bias
    output = sums.float() * packed.scale
    return output if row_scales is None else output * row_scales.unsqueeze(-1)


def quantizing_linear(x: Tensor, packed: PackedInt8, bias: Tensor | None) -> Tensor:  # [M, K] -> [M, N]
    """Quantise rows, multiply them, add the bias [N] in float32, and round to the dtype of x."""
    output = int8_linear(*quantize_rows(x), packed)
    return (output if bias is None else output + bias).to(x.dtype)


def int8_mlp(x: Tensor, gate_up: PackedInt8, down: PackedInt8) -> Tensor:  # [M, D] -> [M, D]
    """Run rows through gate_up [2F, D], SwiGLU in float32, and down [D, F]; round to the dtype of x."""
    gate, up = int8_linear(*quantize_rows(x), gate_up).chunk(2, dim=-1)
    return int8_linear(*quantize_rows(F.silu(gate) * up), down).to(x.dtype)


def int8_product(rows: Tensor, weight: Tensor) -> Tensor:  # [M, K] int8, [N, K] int8 -> [M, N] int32
    """Sum exactly: every partial sum of a product of this many columns is a whole number float32 holds."""
    sums = torch.zeros(rows.shape[0], weight.shape[0], dtype=torch.int32, device=rows.device)
    for some, columns in zip(
        rows.split(EXACT_COLUMNS, dim=1), weight.split(EXACT_COLUMNS, dim=1), strict=True
    ):
        sums += F.linear(some.float(), columns.float()).to(torch.int32)
    return sums
