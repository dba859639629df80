"""The arithmetic of the native int8 kernel again, from its description: exact integers, NumPy's float32.

Shapes: M rows, K in-features, N out-features, R rows, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
ROUNDER = np.float32(1.5 * 2**23)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that is not packed: [N, K] int8, [N] float32, [N] int32."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None = None


def some_weight(seed: int, num_out: int, num_in: int, scale: float = 0.01) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    return Weight(codes, scale * (0.1 + torch.rand(num_out, generator=generator)))


def some_int8_rows(
    seed: int, num_rows: int, num_in: int
) -> tuple[Tensor, Tensor]:  # [M, K] int8, [M] float32
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-127, 128, (num_rows, num_in), generator=generator, dtype=torch.int8)
    return rows, 0.001 + torch.rand(num_rows, generator=generator) / 100


def linear(rows: Tensor, row_scales: Tensor, weight: Weight) -> Tensor:  # [M, K], [M] -> [M, N]
    """Products of int8 are whole numbers below 2**14: float64 adds 2**39 of them without rounding."""
    sums = (rows.double() @ weight.codes.double().t()).to(torch.int64)
    if weight.bias is not None:
        sums += weight.bias
    return sums.float() * weight.scale * row_scales.unsqueeze(1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:  # [M, K] finite -> [M, K] int8, [M]
    scales = x.abs().amax(dim=1) / 127
    divided = x / torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(1)
    return torch.round(divided).clamp(-127, 127).to(torch.int8), scales


def exponential(x: Floats) -> Floats:
    """e^x = 2^k e^r with r = x - k ln 2, and e^r by Taylor's series; each operation rounds to float32."""
    x = np.minimum(np.maximum(x, np.float32(-104)), np.float32(89.5))
    k = (x * np.float32(1.44269504) + ROUNDER) - ROUNDER
    r = x - k * np.float32(0.693359375) - k * np.float32(-2.12194440e-4)
    total = np.full_like(x, np.float32(1) / np.float32(5040))
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        total = total * r + np.float32(1) / np.float32(factorial)
    half = np.floor(k / np.float32(2))
    return total * np.exp2(half) * np.exp2(k - half)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # 2 x [M, F] float32 -> [M, F]
    x = gate.numpy()
    with np.errstate(over="ignore"):
        return torch.from_numpy(x / (np.float32(1) + exponential(-x)) * up.numpy())


def experts(
    rows: Tensor, row_scales: Tensor, counts: list[int], gate_up: list[Weight], down: list[Weight]
) -> Tensor:  # [R, D] -> [R, D]
    outputs = []
    shares = zip(rows.split(counts), row_scales.split(counts), gate_up, down, strict=True)
    for own, own_scales, first, second in shares:
        gate, up = linear(own, own_scales, first).chunk(2, dim=1)
        outputs.append(linear(*quantize_rows(swiglu(gate, up)), second))
    return torch.cat(outputs)
