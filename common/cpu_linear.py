"""A linear layer of float weights on a CPU, row-invariant, by the kernel that suits the processor.

bfloat16 is multiplied by the kernel for AVX-512 BF16, elsewhere by the float kernels, which widen it: torch
takes several times as long where the processor has no such instructions. float32 is multiplied by torch.
Shapes: M rows, K in-features, N out-features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common import native_bf16, native_floats, rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [M, K], [N, K], [N] -> [M, N]
    """Multiply every row by the weight; the bias is added after the product was rounded."""
    native = None
    if x.dtype == torch.bfloat16:
        native = native_bf16.installed() or native_floats.installed()
    if native is None:
        return rows.linear(x, weight, bias)
    output = native.linear(x, weight)
    return output if bias is None else output + bias
