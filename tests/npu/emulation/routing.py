"""The choice of experts and the sorting of rows by expert, as torch_npu's documentation defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.npu.emulation.limits import FLOAT, require, require_dtype, require_shape

GATHER = 0


def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **rest: object,
) -> tuple[Tensor, Tensor, Tensor | None]:
    require(not any(value is not None for value in rest.values()), f"not emulated: {rest}")
    require_dtype("x", x, *FLOAT)
    num_experts = x.shape[-1]
    require(x.dim() == 2 and num_experts <= 2048, "x is [n, E] with E <= 2048")
    require(renorm == 0, "renorm is 0")
    require(group_count > 0 and num_experts % group_count == 0, "E is divisible by group_count")
    size = num_experts // group_count
    require(size > 2 and -(-size // 32) * 32 * group_count <= 2048, "a group has more than 2 experts")
    require(1 <= k_group <= group_count and 1 <= k <= size * k_group, "k experts fit into k_group groups")
    scores = x.float().sigmoid() if norm_type == 1 else x.float().softmax(dim=-1)
    choice = scores
    if bias is not None:
        require_dtype("bias", bias, x.dtype)
        require_shape("bias", bias, num_experts)
        choice = scores + bias.float()
    groups = choice.unflatten(-1, (group_count, size))
    best = groups.topk(2, dim=-1).values.sum(-1) if group_select_mode == 1 else groups.amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(k_group, dim=-1).indices, True)
    allowed = kept.repeat_interleave(size, dim=-1)
    ids = choice.masked_fill(~allowed, float("-inf")).topk(k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = (weights * routed_scaling_factor).to(x.dtype)
    return weights, ids.to(torch.int32), scores if out_flag else None


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, None]:
    require_dtype("x", x, *FLOAT, torch.int8)
    require_dtype("expert_idx", expert_idx, torch.int32)
    require(
        x.dim() == 2 and expert_idx.dim() == 2 and len(x) == len(expert_idx), "x [n, H], expert_idx [n, K]"
    )
    require(scale is None and offset is None and quant_mode == -1, "only without quantisation is emulated")
    require(drop_pad_mode == 0 and expert_tokens_num_flag, "drop_pad_mode 0 and expert_tokens_num_flag True")
    require(expert_tokens_num_type == 1 and row_idx_type == GATHER, "only counts and gather are emulated")
    require(0 < expert_num <= 10240, "expert_num is from 1 to 10240")
    first, last = active_expert_range or (0, expert_num)
    require(0 <= first < last <= expert_num, "active_expert_range lies within expert_num")
    require(active_num in {-1, 0, expert_idx.numel()}, "only all rows are emulated")
    flat = expert_idx.flatten()
    require(
        flat.numel() == 0 or 0 <= int(flat.min()) <= int(flat.max()) < expert_num, "ids lie in expert_num"
    )
    is_active = (flat >= first) & (flat < last)
    keys = torch.where(is_active, flat, torch.full_like(flat, expert_num))
    order = torch.argsort(keys, stable=True)[: int(is_active.sum())]
    # Past the active rows there may be anything.
    expanded = torch.full((flat.numel(), x.shape[1]), 99, dtype=x.dtype)
    expanded[: len(order)] = x[order // expert_idx.shape[1]]
    row_idx = torch.full_like(flat, -1)
    row_idx[order] = torch.arange(len(order), dtype=torch.int32)
    counts = torch.bincount(flat[is_active] - first, minlength=last - first)
    return expanded, row_idx, counts, None
