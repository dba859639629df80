"""Attention on a CPU by torch's own operators: row-invariant, in fixed tiles, with bounded memory.

Shapes: T tokens, S keys of a sequence, N tokens on the decode path, H heads, C kv_lora_rank,
R qk_rope_head_dim.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.rows import MIN_ROWS, OUT_MULTIPLE, per_head_linear, row_sum
from router.kernels.reference import through_latents

# Attention walks over key tiles that start at fixed positions of the sequence, in order, and keeps a
# running maximum, sum and result per query. Every product has one shape, [rows, features] x [features, keys
# of a tile], batched over heads or queries: torch.bmm gives an item the same bits in a batch of any size, and
# a row the same bits at any position. A tile that a query does not see leaves its state as it was, to the
# bit: the maximum stays, the factor is exp(0) = 1, and 0 is added. So chunks, neighbours and padding change
# nothing.
QUERY_ROWS = 64
"""Queries of one product in prefill."""
KEY_MULTIPLE = 64
"""A key tile is the least multiple of this that is whole KV blocks; smaller products are mostly overhead."""
HEADS_AT_ONCE = 16
"""Heads whose keys and values are held in float32 at the same time in prefill."""


class _Attention:
    """Softmax over the keys seen so far, and the values they weigh. B items, Q rows, S keys of a tile."""

    def __init__(self, num_items: int, num_rows: int, num_values: int) -> None:
        self.maximum = torch.full((num_items, num_rows, 1), float("-inf"))
        self.total = torch.zeros(num_items, num_rows, 1)
        self.result = torch.zeros(num_items, num_rows, num_values)

    def add(self, scores: Tensor, values: Tensor) -> None:  # [B, Q, S], [B, S, Dv]
        """See one more tile, of the first B items; hidden keys have score -inf and finite values."""
        count = scores.shape[0]
        maximum, total, result = self.maximum[:count], self.total[:count], self.result[:count]
        new_maximum = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
        fading = torch.exp(maximum - new_maximum)
        weights = torch.exp(scores.sub_(new_maximum))
        total.mul_(fading).add_(row_sum(weights))
        result.mul_(fading).add_(torch.bmm(weights, values))
        maximum.copy_(new_maximum)

    def mean(self) -> Tensor:  # [B, Q, Dv]
        """Return the values, weighed."""
        return self.result / self.total


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, tile: int
) -> Tensor:  # [T, H, Dq], [S, H, Dq], [S, H, Dv] -> [T, H, Dv]
    """Attend within one sequence; query i stands at position start + i."""
    num_queries, num_heads, num_values = q.shape[0], q.shape[1], v.shape[2]
    num_keys = start + num_queries
    key_tile = math.lcm(tile, KEY_MULTIPLE)
    output = q.new_empty(num_queries, num_heads, num_values)
    for first_head in range(0, num_heads, HEADS_AT_ONCE):
        heads = slice(first_head, first_head + HEADS_AT_ONCE)
        keys = _by_head(k[:num_keys, heads], key_tile, 1)
        values = _by_head(v[:num_keys, heads], key_tile, OUT_MULTIPLE)
        for first in range(0, num_queries, QUERY_ROWS):
            rows = slice(first, min(first + QUERY_ROWS, num_queries))
            queries = _by_head(q[rows, heads], QUERY_ROWS, 1)
            attended = _attend_rows(queries, keys, values, start + first, scale, key_tile)
            output[rows, heads] = attended[:, : rows.stop - first, :num_values].transpose(0, 1).to(q.dtype)
    return output


def _by_head(x: Tensor, row_multiple: int, column_multiple: int) -> Tensor:  # [S, H, D] -> [H, S', D']
    """Copy to float32, one matrix per head, zero-padded to whole tiles."""
    num_rows, num_heads, num_columns = x.shape
    wide = torch.zeros(
        num_heads, num_rows + -num_rows % row_multiple, num_columns + -num_columns % column_multiple
    )
    wide[:, :num_rows, :num_columns] = x.transpose(0, 1)
    return wide


def _attend_rows(  # [H, 64, Dq], [H, S, Dq], [H, S, Dv] -> [H, 64, Dv]
    queries: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, key_tile: int
) -> Tensor:
    attention = _Attention(queries.shape[0], queries.shape[1], values.shape[2])
    positions = start + torch.arange(queries.shape[1]).unsqueeze(1)  # [64, 1]
    num_visible = min(start + queries.shape[1], keys.shape[1])
    for first in range(0, num_visible, key_tile):  # no tile above the diagonal
        tile = slice(first, first + key_tile)
        scores = torch.bmm(queries, keys[:, tile].transpose(1, 2)).mul_(scale)
        if tile.stop > start + 1:
            scores.masked_fill_(torch.arange(tile.start, tile.stop) > positions, float("-inf"))
        attention.add(scores, values[:, tile])
    return attention.mean()


def absorbed_attention(
    q: Tensor, kv_b: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:  # [N, H, nope + R], [H, nope + v, C] -> [N, H, v]
    """Attend to cached latents in their own space, each query to a sequence of its own."""
    attend = partial(
        decode_attention, cache=cache, block_tables=block_tables, context_lens=context_lens, scale=scale
    )
    return through_latents(q, kv_b, cache.shape[2], per_head_linear, attend)


def decode_attention(  # -> [N, H, C]
    q_latent: Tensor, q_pe: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Attend to cached latents, all queries together, tile by tile."""
    num_queries, num_heads, num_latents = q_latent.shape
    if num_queries == 0:
        return torch.empty_like(q_latent)
    # Longest first: the queries that see a tile are then a prefix.
    order = torch.argsort(context_lens, descending=True)
    lengths = context_lens[order]
    queries = _padded_queries(q_latent[order], q_pe[order])  # [N, H', W]
    blocks_per_tile = math.lcm(cache.shape[1], KEY_MULTIPLE) // cache.shape[1]
    key_tile = blocks_per_tile * cache.shape[1]
    tables = F.pad(block_tables[order], (0, -block_tables.shape[1] % blocks_per_tile))
    num_values = num_latents + -num_latents % OUT_MULTIPLE

    attention = _Attention(num_queries, queries.shape[1], num_values)
    # A tile is read once, for the queries that see it, and forgotten: memory does not grow with the context.
    for index, first in enumerate(range(0, int(lengths[0]), key_tile)):
        count = int((lengths > first).sum())
        blocks = tables[:count, index * blocks_per_tile : (index + 1) * blocks_per_tile]
        is_hidden = torch.arange(first, first + key_tile) >= lengths[:count].unsqueeze(1)  # [N, S]
        latents = _read_tile(cache, blocks, is_hidden, queries.shape[2])
        scores = torch.bmm(queries[:count], latents.transpose(1, 2)).mul_(scale)
        scores.masked_fill_(is_hidden.unsqueeze(1), float("-inf"))
        attention.add(scores, latents[..., :num_values])

    output = torch.empty_like(q_latent)
    output[order] = attention.mean()[:, :num_heads, :num_latents].to(q_latent.dtype)
    return output


def _padded_queries(q_latent: Tensor, q_pe: Tensor) -> Tensor:  # [N, H, C], [N, H, R] -> [N, H', W]
    """Join both halves of the queries in float32, with at least 16 heads and a width in multiples of 16."""
    num_queries, num_heads, num_latents = q_latent.shape
    width = num_latents + q_pe.shape[2]
    queries = torch.zeros(num_queries, max(num_heads, MIN_ROWS), width + -width % OUT_MULTIPLE)
    queries[:, :num_heads, :num_latents] = q_latent
    queries[:, :num_heads, num_latents:width] = q_pe
    return queries


def _read_tile(cache: Tensor, blocks: Tensor, is_hidden: Tensor, width: int) -> Tensor:  # -> [N, S, W]
    """Read blocks [N, n] in float32. What no token wrote becomes 0: it may be NaN, and 0 times NaN is NaN."""
    rows = cache.index_select(0, blocks.flatten()).view(*is_hidden.shape, cache.shape[2])
    if bool(is_hidden.any()):
        rows.masked_fill_(is_hidden.unsqueeze(-1), 0)
    return F.pad(rows, (0, width - cache.shape[2])).float() if width != cache.shape[2] else rows.float()
