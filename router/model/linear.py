"""A linear layer whose arithmetic is the device's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from router.kernels import RouterKernels


class Linear(nn.Module):
    """weight [out, in] and, where the checkpoint has one, bias [out]. Filled by the loader."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernels: RouterKernels,
        dtype: torch.dtype,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if has_bias else None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        """Multiply every row by the weight."""
        return self.kernels.linear(x, self.weight, self.bias)
