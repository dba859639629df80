"""How an emulation says that a call is outside of what its operator documents."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOAT = (*HALF, torch.float32)
ND = 2
FRACTAL_NZ = 29


class OutsideLimits(ValueError):
    """A call that torch_npu lets through and CANN would refuse, or answer with anything."""


def require(holds: bool, what: str) -> None:
    """Raise unless a documented condition holds."""
    if not holds:
        raise OutsideLimits(what)


def require_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise unless a tensor has a documented dtype."""
    require(tensor.dtype in dtypes, f"{name} is {tensor.dtype}, documented are {dtypes}")


def require_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise unless a tensor has the documented shape."""
    require(tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, documented is {shape}")


def require_contiguous(**tensors: Tensor | None) -> None:
    """Raise where a tensor is a view with gaps or in another order."""
    for name, tensor in tensors.items():
        require(tensor is None or tensor.is_contiguous(), f"{name} must be contiguous")


def format_of(tensor: Tensor) -> int:
    """The format in which torch_npu says that an argument lies in memory."""
    return int(getattr(tensor, "npu_format", ND))
