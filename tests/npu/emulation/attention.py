"""npu_fused_infer_attention_score: latents in pages, and whole prompts, as torch_npu documents them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.npu.emulation.limits import (
    HALF,
    require,
    require_contiguous,
    require_dtype,
    require_shape,
)

CAUSAL = 3
MASK_SIZE = 2048
LATENT_HEADS = (32, 64, 128)
PROMPT_HEADS = (8, 16, 32, 64, 128)
UNUSED = (None, 0, False, 2147483647)


def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    **rest: object,
) -> tuple[Tensor, None]:
    require(all(one in UNUSED for one in rest.values()), f"not emulated: {rest}")
    require_contiguous(query=query, key=key, value=value, query_rope=query_rope, key_rope=key_rope)
    require_contiguous(atten_mask=atten_mask, block_table=block_table)
    require(actual_seq_lengths_kv is not None, "actual_seq_lengths_kv is needed")
    lengths = actual_seq_lengths_kv or []
    if input_layout == "TND":
        require(query_rope is None and key_rope is None and block_table is None, "TND: none of these")
        output = _prompts(
            query, key, value, atten_mask, actual_seq_lengths or [], lengths, scale, sparse_mode
        )
        require(
            num_heads == num_key_value_heads == query.shape[1], "TND: as many heads of keys as of queries"
        )
        return output, None  # softmax_lse, which nobody asked for
    require(
        input_layout == "BNSD" and query_rope is not None and key_rope is not None, "BNSD with both ropes"
    )
    if query_rope is None or key_rope is None or block_table is None:
        raise AssertionError
    require(num_heads == query.shape[1] and num_key_value_heads == 1, "one head of keys")
    require(sparse_mode == 0 and atten_mask is None, "one query token takes no mask")
    require(value.data_ptr() == key.data_ptr(), "the latents are keys and values")
    queries = torch.cat([query, query_rope], dim=-1)
    keys = torch.cat([key, key_rope], dim=-1)
    _check_latents(query, query_rope, key, key_rope, block_table, block_size, lengths)
    return _latents(queries, keys, block_table, lengths, scale, query.shape[-1]), None


def _check_latents(
    query: Tensor,
    query_rope: Tensor,
    key: Tensor,
    key_rope: Tensor,
    block_table: Tensor,
    block_size: int,
    lengths: list[int],
) -> None:
    batch, heads, tokens, _ = query.shape
    require_dtype("query", query, *HALF)
    for name, one in (("key", key), ("query_rope", query_rope), ("key_rope", key_rope)):
        require_dtype(name, one, query.dtype)
    require_shape("query", query, batch, heads, tokens, 512)
    require_shape("query_rope", query_rope, batch, heads, tokens, 64)
    require(heads in LATENT_HEADS, f"heads are {LATENT_HEADS}")
    require(tokens == 1, "one query token per sequence is emulated")
    require(block_size in {16, 128}, "block_size is 16 or 128")
    require_shape("key", key, key.shape[0], 1, block_size, 512)
    require_shape("key_rope", key_rope, key.shape[0], 1, block_size, 64)
    require_dtype("block_table", block_table, torch.int32)
    require(len(lengths) == batch == len(block_table), "a length and a row of blocks for each query")
    most = -(-max(lengths) // block_size)
    require(block_table.dim() == 2 and block_table.shape[1] >= most, "block_table reaches the longest")
    require(key.numel() < 2**31, "key has fewer than 2**31 elements")


def _latents(
    queries: Tensor, keys: Tensor, block_table: Tensor, lengths: list[int], scale: float, num_values: int
) -> Tensor:
    output = queries.new_empty(*queries.shape[:3], num_values)
    for row, length in enumerate(lengths):
        seen = keys[block_table[row].long(), 0].flatten(0, 1)[:length].float()  # [S, 576]
        weights = (queries[row, :, 0].float() @ seen.T * scale).softmax(dim=-1)
        output[row, :, 0] = (weights @ seen[:, :num_values]).to(output.dtype)
    return output


def _prompts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ends: list[int],
    key_ends: list[int],
    scale: float,
    sparse_mode: int,
) -> Tensor:
    require_dtype("query", query, torch.bfloat16)
    require(key.dtype == value.dtype == query.dtype, "all of one dtype")
    tokens, heads, width = query.shape
    require(heads in PROMPT_HEADS and key.shape[1] == value.shape[1] == heads, f"heads are {PROMPT_HEADS}")
    require(width == key.shape[2] == 192 and value.shape[2] in {128, 192}, "D is 192, of values 128 or 192")
    require(max(tokens, len(key)) <= 65536, "T is 65536 at most")
    require(sparse_mode == CAUSAL and mask is not None, "only the causal mask is emulated")
    if mask is None:
        raise AssertionError
    require_dtype("atten_mask", mask, torch.bool, torch.int8, torch.uint8)
    require_shape("atten_mask", mask, MASK_SIZE, MASK_SIZE)
    require(torch.equal(mask.bool(), torch.ones(MASK_SIZE, MASK_SIZE).triu(1).bool()), "the mask is causal")
    require(len(ends) == len(key_ends) == 1, "one sequence is emulated")
    require(ends[-1] == tokens and key_ends[-1] == len(key), "lengths are those of the tensors")
    require(ends[-1] <= key_ends[-1], "no more queries than keys")
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    positions = len(key) - tokens + torch.arange(tokens)
    hidden = torch.arange(len(key)) > positions.unsqueeze(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)
