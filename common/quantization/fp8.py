"""DeepSeek's official FP8 format: float8 weights in blocks, each block with one float32 scale.

Shapes: N out-features, K in-features, of a block b_n and b_k.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_shape(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, int]:
    """Return the number of blocks in both directions; those at the edge may be cut off."""
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def dequantize_blocks(
    weight: Tensor, scale_inv: Tensor, block_size: tuple[int, int], dtype: torch.dtype
) -> Tensor:  # [N, K] float8, [ceil(N / b_n), ceil(K / b_k)] -> [N, K]
    """Multiply every block by its scale in float32 and round once to `dtype`.

    In spite of its name weight_scale_inv is multiplied with, as in DeepSeek's own conversion to bfloat16.
    """
    rows, columns = block_size
    output = torch.empty(weight.shape, dtype=dtype)
    # One band of blocks at a time: in float32 there is never more than a band.
    for band, first in enumerate(range(0, weight.shape[0], rows)):
        own = slice(first, first + rows)
        scales = scale_inv[band].float().repeat_interleave(columns)[: weight.shape[1]]
        output[own] = weight[own].float() * scales
    return output
