"""Norm, rotary positions, SwiGLU and quantisation of rows, as torch_npu's documentation defines them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.npu.emulation.limits import FLOAT, HALF, require, require_dtype, require_shape

MAX_INT8 = 127
QINT8 = {torch.qint8, 12}
"""torch.qint8, and its number where an operator takes dtypes as numbers."""


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    require_dtype("input", x, *FLOAT)
    require_dtype("gamma", gamma, x.dtype)
    require(2 <= x.dim() <= 8, "input has 2 to 8 dimensions")
    require_shape("gamma", gamma, x.shape[-1])
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    require(rotary_mode == "interleave" and rotate is None, "only interleave is emulated")
    require_dtype("input", x, *FLOAT)
    for name, one in (("r1", r1), ("r2", r2)):
        require_dtype(name, one, x.dtype)
        require_shape(name, one, 1, x.shape[1], 1, x.shape[3])  # 1S1D beside BSND
        require(one.numel() == 0 or float(one.abs().max()) <= 1, f"{name} lies between -1 and 1")
    require(x.dim() == 4 and x.shape[0] * x.shape[2] < 1000, "interleave: BSND with B * N below 1000")
    require(x.shape[3] < 896 and x.shape[3] % 2 == 0, "D is even and below 896")
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return r1 * x + r2 * turned


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    require_dtype("input", x, *FLOAT)
    require(1 <= x.dim() <= 8 and x.shape[dim] % 2 == 0, "the dimension that is halved is even")
    first, second = x.float().chunk(2, dim=dim)
    return (F.silu(first) * second).to(x.dtype)


def quantized(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by their own largest value: scale = max|x| / 127, rows = round(x / scale)."""
    scale = wide.abs().amax(dim=-1) / MAX_INT8
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    return torch.round(wide / divisor).clamp(-MAX_INT8, MAX_INT8).to(torch.int8), scale


def dynamic_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    require(smooth_scales is None and group_index is None, "smoothing is not emulated")
    require(dst_type is None and quant_mode == "pertoken", "only int8 per token is emulated")
    require_dtype("input", x, *HALF)
    require(x.dim() > 1, "input has more than one dimension")
    return quantized(x.float())


def quantize(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: torch.dtype | int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    require(dtype in QINT8 and div_mode, "only qint8 by division is emulated")
    require_dtype("input", x, *FLOAT)
    require_dtype("scales", scales, torch.float32, torch.bfloat16)
    require(scales.dim() == 1 and scales.numel() in {1, x.shape[axis]}, "scales: one, or one per column")
    result = torch.round(x.float() / scales.float())
    if zero_points is not None:
        require_dtype("zero_points", zero_points, torch.int8, torch.uint8, torch.int32, torch.bfloat16)
        require_shape("zero_points", zero_points, *scales.shape)
        result = result + zero_points.float()
    return result.clamp(-MAX_INT8 - 1, MAX_INT8).to(torch.int8)


def dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    **rest: object,
) -> tuple[Tensor, Tensor]:
    require(bias is None and quant_scale is None and quant_offset is None, "these are not emulated")
    require(activate_left and quant_mode == 1, "only silu(left) * right, per token, is emulated")
    require(weight_scale is not None and activation_scale is not None and group_index is not None, "scales")
    if weight_scale is None or activation_scale is None or group_index is None:
        raise AssertionError
    require_dtype("x", x, torch.int32)
    require_dtype("weight_scale", weight_scale, torch.float32)
    require_dtype("activation_scale", activation_scale, torch.float32)
    require_dtype("group_index", group_index, torch.int64)
    require_shape("weight_scale", weight_scale, len(group_index), x.shape[1])
    require(int(group_index.sum()) == len(x), "group_index counts the rows of x")
    scales = torch.repeat_interleave(weight_scale, group_index, dim=0)
    return swiglu_quantized(x, scales, activation_scale.flatten())


def swiglu_quantized(sums: Tensor, scales: Tensor, row_scales: Tensor) -> tuple[Tensor, Tensor]:
    """What all fused forms have in common: [M, 2F] int32, [M, 2F], [M] -> [M, F] int8, [M]."""
    wide = sums.float() * scales * row_scales.unsqueeze(-1)
    left, right = wide.chunk(2, dim=-1)
    return quantized(F.silu(left) * right)
