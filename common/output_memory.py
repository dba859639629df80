"""Where a native kernel writes the result of the experts: memory it was offered, or a tensor of its own.

Shapes: R rows, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_memory(rows: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:  # [R, D] -> [R, D]
    """Return `out`, or a new tensor where it is None, for the result of rows [R, D] in `dtype`.

    Raises:
        ValueError: `out` is of another shape or dtype, or its rows do not follow one another.
    """
    if out is None:
        return torch.empty(rows.shape, dtype=dtype)
    if out.shape != rows.shape or out.dtype != dtype or not out.is_contiguous() or not out.is_cpu:
        raise ValueError(
            f"out {list(out.shape)} of {out.dtype} on {out.device} with strides {list(out.stride())} cannot "
            f"take the result of rows {list(rows.shape)}: give a contiguous one of {dtype} on the CPU"
        )
    return out
