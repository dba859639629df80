"""Grouped and quantised products, as torch_npu's documentation defines them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tests.npu.emulation.limits import (
    FLOAT,
    FRACTAL_NZ,
    format_of,
    require,
    require_dtype,
    require_shape,
)
from tests.npu.emulation.rows import swiglu_quantized

INNER_LIMIT = 65536
MOST_GROUPS = 1024
MOST_LISTED = 128
CUMULATIVE, COUNTED = 0, 1
INT32, BFLOAT16, FLOAT16 = 3, 15, 5
"""How ScalarType numbers dtypes, where an operator takes numbers."""
DTYPES = {INT32: torch.int32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}


def int32_product(rows: Tensor, weight: Tensor) -> Tensor:  # [M, K] int8, [K, N] int8 -> [M, N] int32
    return torch.mm(rows.to(torch.int32), weight.to(torch.int32))


def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = CUMULATIVE,
    act_type: int = 0,
    output_dtype: torch.dtype | int | None = None,
    **rest: object,
) -> list[Tensor]:
    require(not any(value is not None for value in rest.values()), f"not emulated: {rest}")
    require(len(x) == 1 and len(weight) == 1, "one x and one weight are emulated")
    require(split_item in {2, 3} and group_type == 0, "one x, one weight: split_item 2 or 3, group_type 0")
    require(bias is None and act_type == 0, "bias and activation are not emulated")
    rows, stack = x[0], weight[0]
    require(rows.dim() == 2 and rows.is_contiguous(), "x is a matrix and not transposed")
    require(stack.dim() == 3 and stack.shape[1] == rows.shape[1], "weight is [E, K, N], K the columns of x")
    require(max(rows.shape[-1], stack.shape[-1]) < INNER_LIMIT, f"inner axes stay below {INNER_LIMIT}")
    spans = spans_of(group_list, len(stack), len(rows), group_list_type)
    if rows.dtype == torch.int8:
        return [_int8(rows, stack, spans, scale, per_token_scale, output_dtype)]
    require_dtype("x", rows, *FLOAT)
    require_dtype("weight", stack, rows.dtype)
    require(scale is None and per_token_scale is None and output_dtype is None, "scales belong to int8")
    output = rows.new_empty(len(rows), stack.shape[2])
    for (begin, end), matrix in zip(spans, stack, strict=True):
        output[begin:end] = rows[begin:end] @ matrix
    return [output]


def _int8(
    rows: Tensor,
    stack: Tensor,
    spans: list[tuple[int, int]],
    scale: list[Tensor] | None,
    per_token_scale: list[Tensor] | None,
    output_dtype: torch.dtype | int | None,
) -> Tensor:
    require_dtype("weight", stack, torch.int8)
    wanted = DTYPES.get(output_dtype, output_dtype) if isinstance(output_dtype, int) else output_dtype
    sums = torch.empty(len(rows), stack.shape[2], dtype=torch.int32)
    for (begin, end), matrix in zip(spans, stack, strict=True):
        sums[begin:end] = int32_product(rows[begin:end], matrix)
    if wanted == torch.int32:
        require(scale is None and per_token_scale is None, "int32 results are the sums themselves")
        return sums
    require(scale is not None and per_token_scale is not None, "int8 by tokens needs both scales")
    if scale is None or per_token_scale is None or not isinstance(wanted, torch.dtype):
        raise AssertionError
    # The documented pairs: scale and result are both bfloat16, or float32 and float16.
    pairs = {torch.bfloat16: torch.bfloat16, torch.float32: torch.float16}
    require(pairs.get(scale[0].dtype) == wanted, f"scales in {scale[0].dtype} do not give {wanted}")
    require_dtype("per_token_scale", per_token_scale[0], torch.float32)
    require_shape("scale", scale[0], len(stack), stack.shape[2])
    require_shape("per_token_scale", per_token_scale[0], len(rows))
    counts = torch.tensor([end - begin for begin, end in spans])
    wide = sums.float() * torch.repeat_interleave(scale[0].float(), counts, dim=0)
    return (wide * per_token_scale[0].unsqueeze(-1)).to(wanted)


def spans_of(group_list: Tensor | None, num_groups: int, num_rows: int, kind: int) -> list[tuple[int, int]]:
    """First row and one past the last of every group; the last row ends the last group."""
    require(group_list is not None and group_list.dim() == 1, "group_list is a vector")
    if group_list is None:
        raise AssertionError
    require_dtype("group_list", group_list, torch.int64)
    require(len(group_list) == num_groups <= MOST_GROUPS, f"one entry per group, {MOST_GROUPS} at most")
    require(kind == CUMULATIVE or num_groups > 1, "counts need more than one group")
    ends = (group_list if kind == CUMULATIVE else group_list.cumsum(0)).tolist()
    require(all(begin <= end for begin, end in pairwise([0, *ends])), "group_list never falls")
    require(ends[-1] == num_rows, f"groups end at {ends[-1]}, x has {num_rows} rows")
    return list(pairwise([0, *ends]))


def grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    require(bias is None and offset is None, "bias and offset are not supported")
    require_dtype("x", x, torch.int8)
    require_dtype("weight", weight, torch.int8)
    require_dtype("weight_scale", weight_scale, *FLOAT)
    require_dtype("x_scale", x_scale, torch.float32)
    require(format_of(weight) == FRACTAL_NZ, "weight is in FRACTAL_NZ: it is taken as such whatever it is")
    require(weight.dim() == 3 and weight.shape[1] == x.shape[1], "weight is [E, K, N], K the columns of x")
    require(weight.shape[1] < INNER_LIMIT and weight.shape[2] <= 10240, "K < 65536 and N <= 10240")
    require_shape("weight_scale", weight_scale, len(weight), weight.shape[2])
    require_shape("x_scale", x_scale, len(x))
    spans = spans_of(group_list, len(weight), len(x), CUMULATIVE)
    sums = torch.empty(len(x), weight.shape[2], dtype=torch.int32)
    for (begin, end), matrix in zip(spans, weight, strict=True):
        sums[begin:end] = int32_product(x[begin:end], matrix)
    counts = torch.tensor([end - begin for begin, end in spans])
    scales = torch.repeat_interleave(weight_scale.float(), counts, dim=0)
    return (*swiglu_quantized(sums, scales, x_scale), None)


def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | int | None = None,
    **rest: object,
) -> Tensor:
    require(not any(value is not None for value in rest.values()), f"not emulated: {rest}")
    wanted = DTYPES.get(output_dtype, output_dtype) if isinstance(output_dtype, int) else output_dtype
    require(wanted == torch.int32, "only int32 results are emulated")
    require(offset is None and pertoken_scale is None, "int32 results take neither offset nor pertoken_scale")
    require_dtype("x1", x1, torch.int8)
    require_dtype("x2", x2, torch.int8)
    require_dtype("scale", scale, torch.float32, torch.bfloat16)
    require(min(x1.numel(), x2.numel(), scale.numel()) > 0, "x1, x2 and scale are not empty")
    require(x1.dim() == x2.dim() == 2 and x1.shape[1] == x2.shape[0], "x1 is [M, K] and x2 [K, N]")
    require(max(x1.shape[1], x2.shape[1]) <= 65535, "last axes are 65535 at most")
    require(scale.dim() == 1 and len(scale) in {1, x2.shape[1]}, "scale is [1] or [N]")
    sums = int32_product(x1, x2)
    if bias is not None:
        require_dtype("bias", bias, torch.int32)
        require_shape("bias", bias, x2.shape[1])
        sums = sums + bias
    return sums


def format_cast(x: Tensor, acl_format: int, **rest: object) -> Tensor:
    require(not any(value is not None for value in rest.values()), f"not emulated: {rest}")
    # Laid out in another way, which only operators see; a view of such a tensor means nothing.
    require(x.is_contiguous(), "only whole tensors are cast")
    return x
