"""Attention on the CPU gives a token the same bits, however its sequence is cut, stored or accompanied."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from router.kernels import cpu, reference, tiled_attention
from tests.kernels.comparing import THREAD_COUNTS, num_threads, randn

SHAPES = pytest.mark.parametrize(
    ("heads", "latents", "rope", "block"),
    [(1, 32, 8, 16), (2, 20, 6, 4), (4, 32, 16, 24), (16, 512, 64, 128)],
)


ATTENTIONS = (cpu, tiled_attention)
"""The native kernels where they were built, and what stands in for them elsewhere."""


@pytest.fixture(params=ATTENTIONS, ids=["cpu", "tiled"])
def attention(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


def prompt(
    length: int, heads: int, dtype: torch.dtype = torch.float32, size: int = 24, values: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (randn(seed, length, heads, size, dtype=dtype) for seed in (1, 2))
    return q, k, randn(3, length, heads, values, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "tile"), [(1, 16), (2, 4), (4, 24), (18, 128)])
def test_prefill_in_chunks_gives_the_bits_of_prefill_at_once(
    attention: ModuleType, heads: int, tile: int, dtype: torch.dtype
) -> None:
    q, k, v = prompt(300, heads, dtype)
    with num_threads(1):
        expected = attention.prefill_attention(q, k, v, 0, 0.3, tile)
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for cuts in [(0, 300), (0, 1, 2, 3, 300), (0, 63, 64, 65, 128, 300), (0, 150, 299, 300)]:
                for first, last in pairwise(cuts):
                    chunk = attention.prefill_attention(q[first:last], k[:last], v[:last], first, 0.3, tile)
                    assert torch.equal(chunk, expected[first:last]), (cuts, first, threads)


def test_prefill_does_not_look_at_keys_after_the_last_query(attention: ModuleType) -> None:
    q, k, v = prompt(200, 2)
    expected = attention.prefill_attention(q[:90], k[:90], v[:90], 0, 0.3, 16)
    k[90:], v[90:] = float("nan"), float("inf")
    assert torch.equal(attention.prefill_attention(q[:90], k, v, 0, 0.3, 16), expected)


def test_prefill_gives_a_head_the_same_bits_at_real_sizes_with_any_number_of_threads(
    attention: ModuleType,
) -> None:
    q, k, v = prompt(200, 16, torch.bfloat16, 192, 128)
    with num_threads(1):
        expected = attention.prefill_attention(q, k, v, 0, 0.1, 128)
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            assert torch.equal(attention.prefill_attention(q[77:], k, v, 77, 0.1, 128), expected[77:])


class Decode:
    """Some sequences of different lengths in one cache, whose unused slots hold garbage."""

    def __init__(
        self,
        heads: int,
        latents: int,
        rope: int,
        block: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        attention: ModuleType = cpu,
    ) -> None:
        self.attention = attention
        self.lengths = [1, 2, block, block + 1, 64, 65, 130, 3 * block - 1, 3 * block]
        widths = [-(-length // block) for length in self.lengths]
        order = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        garbage = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38]).to(dtype)
        size = (sum(widths) + 3, block, latents + rope)
        self.cache = garbage[torch.arange(size[0] * size[1] * size[2]) % 4].view(size).clone()
        self.tables = torch.full((len(widths), max(widths) + 1), order.pop())
        for row, (length, width) in enumerate(zip(self.lengths, widths, strict=True)):
            table = torch.tensor([order.pop() for _ in range(width)])
            self.tables[row, :width] = table
            positions = torch.arange(length)
            slots = table[positions // block] * block + positions % block
            stored = randn(100 + row, length, latents + rope, dtype=dtype)
            reference.store_latents(self.cache, slots, stored[:, :latents], stored[:, latents:])
        self.q = randn(1, len(widths), heads, 12 + rope, dtype=dtype)
        self.kv_b = randn(2, heads, 12 + 20, latents, dtype=dtype)

    def attend(self, rows: list[int], extra_blocks: int = 0) -> Tensor:
        tables = self.tables[rows]
        tables = torch.cat([tables, tables[:, :1].expand(-1, extra_blocks)], dim=1)
        lengths = torch.tensor(self.lengths)[rows]
        return self.attention.absorbed_attention(self.q[rows], self.kv_b, self.cache, tables, lengths, 0.2)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decode_gives_a_sequence_the_same_bits_alone_and_in_any_company(
    attention: ModuleType, heads: int, latents: int, rope: int, block: int, dtype: torch.dtype
) -> None:
    decode = Decode(heads, latents, rope, block, dtype, attention=attention)
    with num_threads(1):
        expected = decode.attend(list(range(9)))
    assert bool(expected.isfinite().all())
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for rows in [[row] for row in range(9)] + [
                [8, 0],
                [3, 3, 3],
                [1, 7, 2, 6],
                list(range(8, -1, -1)),
            ]:
                assert torch.equal(decode.attend(rows), expected[rows]), (rows, threads)


@SHAPES
def test_decode_does_not_depend_on_where_blocks_lie_or_how_tables_are_padded(
    attention: ModuleType, heads: int, latents: int, rope: int, block: int
) -> None:
    rows = list(range(9))
    expected = Decode(heads, latents, rope, block, seed=0, attention=attention).attend(rows)
    moved = Decode(heads, latents, rope, block, seed=1, attention=attention)
    assert torch.equal(moved.attend(rows), expected)
    assert torch.equal(moved.attend(rows, extra_blocks=37), expected)


def test_decode_leaves_the_cache_as_it_was(attention: ModuleType) -> None:
    decode = Decode(2, 32, 8, 16, attention=attention)
    before = decode.cache.clone()
    decode.attend(list(range(9)))
    assert torch.equal(decode.cache.view(torch.int32), before.view(torch.int32))


def test_attention_of_no_queries_is_empty(attention: ModuleType) -> None:
    decode = Decode(2, 32, 8, 16, attention=attention)
    assert decode.attend([]).shape == (0, 2, 20)
    assert attention.prefill_attention(*prompt(0, 2), 0, 1.0, 16).shape == (0, 2, 20)
