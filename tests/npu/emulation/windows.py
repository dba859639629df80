"""The two operators that write to other ranks' windows, from op-plugin's documents and the kernels' layouts.

They find a window by the group's name in the fake HCCL, as the real ones do in HCCL's context. What the real
ones leave to their caller is checked here: that the registered windows are large enough.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.npu.emulation.limits import HALF, require, require_dtype, require_shape

ALIGNMENT = 512
MEGABYTE = 1 << 20
DEFAULT_BUFFER_MB = 200


def attention_to_ffn(
    x: Tensor,
    session_id: Tensor,
    micro_batch_id: Tensor,
    layer_id: Tensor,
    expert_ids: Tensor,
    expert_rank_table: Tensor,
    group: str,
    world_size: int,
    ffn_token_info_table_shape: Sequence[int],
    ffn_token_data_shape: Sequence[int],
    attn_token_info_table_shape: Sequence[int],
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    active_mask: Tensor | None = None,
    quant_mode: int = 0,
    sync_flag: int = 0,
    ffn_start_rank_id: int = 0,
) -> tuple[()]:
    require(quant_mode == 0 and scales is None, "only rows as they are are emulated")
    require_dtype("x", x, *HALF)
    require(x.dim() == 3 and x.shape[0] == 1, "x is [1, BS, H]")
    _, num_tokens, hidden_size = x.shape
    require(0 < num_tokens <= 512, f"BS is {num_tokens}, and must be from 1 to 512")
    require(1024 <= hidden_size <= 8192, f"H is {hidden_size}, and must be from 1024 to 8192")
    for name, one in (("session_id", session_id), ("micro_batch_id", micro_batch_id), ("layer_id", layer_id)):
        require_dtype(name, one, torch.int32)
        require_shape(name, one, 1)
        require(int(one) == 0, f"{name}: one router, one micro-batch and one table are emulated")
    top_k = expert_ids.shape[-1]
    require_dtype("expert_ids", expert_ids, torch.int32)
    require_shape("expert_ids", expert_ids, 1, num_tokens, top_k)
    require(0 < top_k <= min(16, moe_expert_num), f"K is {top_k}")
    require(0 <= int(expert_ids.min()) <= int(expert_ids.max()) < moe_expert_num, "ids lie in moe_expert_num")
    ordered = expert_ids[0].sort(dim=1).values
    require(bool((ordered[:, 1:] != ordered[:, :-1]).all()), "the K experts of a token differ")
    require(1 <= moe_expert_num <= 1024, f"moe_expert_num is {moe_expert_num}")
    require_dtype("expert_rank_table", expert_rank_table, torch.int32)
    require_shape(
        "expert_rank_table", expert_rank_table, 1, moe_expert_num, 3
    )  # no shared experts, no replicas
    _require_group(group, world_size)
    require(0 <= ffn_start_rank_id < world_size, "ffn_start_rank_id lies in world_size")
    require(list(ffn_token_info_table_shape) == [1, 1, 2 + num_tokens * top_k], "ffn_token_info_table_shape")
    require(list(ffn_token_data_shape) == [1, 1, num_tokens, top_k, hidden_size], "ffn_token_data_shape")
    require(list(attn_token_info_table_shape) == [1, num_tokens, top_k], "attn_token_info_table_shape")
    num_active = num_tokens
    if active_mask is not None:
        require_dtype("active_mask", active_mask, torch.bool)
        require_shape("active_mask", active_mask, 1, num_tokens)
        num_active = int(active_mask.sum())
        require(bool(active_mask[0, :num_active].all()), "all True of active_mask come first")
    rows_at = _aligned(4 * (2 + num_tokens * top_k))
    _require_buffer(4 * (2 + num_tokens * top_k) + 2 * num_tokens * top_k * hidden_size)
    flat_ids, table = expert_ids[0, :num_active].flatten(), expert_rank_table[0]
    sent_to = set()
    for slot, expert in enumerate(flat_ids.tolist()):
        num_ranks, rank, local = table[expert].tolist()
        require(
            num_ranks == 1 and ffn_start_rank_id <= rank < world_size, f"expert {expert} is at rank {rank}"
        )
        window = _window(group, rank, rows_at + 2 * num_tokens * top_k * hidden_size)
        info = window[: 4 * (2 + num_tokens * top_k)].view(torch.int32)
        while int(info[0]) == 1:  # what it does on the device, and for ever: nobody may make it wait for long
            time.sleep(0.001)
        rows = window[rows_at : rows_at + 2 * num_tokens * top_k * hidden_size].view(x.dtype)
        rows.view(-1, hidden_size)[slot] = x[0, slot // top_k]
        info[2 + slot] = local
        sent_to.add(rank)
    told = range(ffn_start_rank_id, ffn_start_rank_id + world_size - 1) if sync_flag == 0 else sent_to
    for rank in told:
        head = _window(group, rank, rows_at)[:8].view(torch.int32)
        head[1] = 0
        head[0] = 1
    return ()


def ffn_to_attention(
    x: Tensor,
    session_ids: Tensor,
    micro_batch_ids: Tensor,
    token_ids: Tensor,
    expert_offsets: Tensor,
    actual_token_num: Tensor,
    group: str,
    world_size: int,
    token_info_table_shape: Sequence[int],
    token_data_shape: Sequence[int],
    *,
    attn_rank_table: Tensor | None = None,
) -> tuple[()]:
    require_dtype("x", x, *HALF)
    require(x.dim() == 2, "x is [Y, H]")
    num_rows, columns = x.shape
    # The documents call these H 1152..8320 and HS 1024..8192, their own kernel the other way round.
    require(1152 <= columns <= 8192, f"H is {columns}, and must be from 1152 to 8192")
    for name, one in (("session_ids", session_ids), ("micro_batch_ids", micro_batch_ids)):
        require_dtype(name, one, torch.int32)
        require_shape(name, one, num_rows)
        require(not one.any(), f"{name}: one router and one micro-batch are emulated")
    micro_batches, num_tokens, top_k = token_info_table_shape
    require(micro_batches == 1 and 0 < num_tokens <= 512 and 0 < top_k <= 16, "token_info_table_shape")
    require(list(token_data_shape) == [1, num_tokens, top_k, columns], "token_data_shape")
    for name, one, size in (("token_ids", token_ids, num_tokens), ("expert_offsets", expert_offsets, top_k)):
        require_dtype(name, one, torch.int32)
        require_shape(name, one, num_rows)
        require(num_rows == 0 or 0 <= int(one.min()) <= int(one.max()) < size, f"{name} lie below {size}")
    require_dtype("actual_token_num", actual_token_num, torch.int64)
    require_shape("actual_token_num", actual_token_num, 1)
    num_sent = int(actual_token_num)
    require(0 <= num_sent <= num_rows, "actual_token_num is at most Y")
    _require_group(group, world_size)
    rank = 0
    if attn_rank_table is not None:
        require_dtype("attn_rank_table", attn_rank_table, torch.int32)
        require_shape("attn_rank_table", attn_rank_table, 1)
        rank = int(attn_rank_table)
    rows_at = _aligned(4 * num_tokens * top_k)
    _require_buffer((4 + 2 * columns) * num_tokens * top_k)
    window = _window(group, rank, rows_at + 2 * num_tokens * top_k * columns)
    flags = window[: 4 * num_tokens * top_k].view(torch.int32)
    rows = window[rows_at : rows_at + 2 * num_tokens * top_k * columns].view(x.dtype).view(-1, columns)
    for index in range(num_sent):
        slot = int(token_ids[index]) * top_k + int(expert_offsets[index])
        rows[slot] = x[index]
        flags[slot] = 1
    return ()


def _require_group(group: str, world_size: int) -> None:
    require(0 < len(group) < 128, "group has 1 to 127 characters")
    require(2 <= world_size <= 768, f"world_size is {world_size}")


def _require_buffer(num_bytes: int) -> None:
    buffer_mb = int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_BUFFER_MB))
    require(num_bytes // MEGABYTE + 1 <= buffer_mb, f"{num_bytes} bytes exceed HCCL_BUFFSIZE={buffer_mb}")


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _window(group: str, rank: int, least_bytes: int) -> Tensor:
    """The window of a peer, as uint8."""
    find = ctypes.CDLL(None).fake_peer_window
    find.restype = ctypes.c_void_p
    size = ctypes.c_uint64()
    begin = find(group.encode(), rank, ctypes.byref(size))
    require(bool(begin), f"rank {rank} has let nobody here into its window")
    require(size.value >= least_bytes, f"the window of rank {rank} has {size.value} bytes, not {least_bytes}")
    return torch.frombuffer((ctypes.c_uint8 * size.value).from_address(begin), dtype=torch.uint8)
