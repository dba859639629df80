"""Row-wise CPU kernels give a row the same bits, whatever stands beside it and however many threads run."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from common import rows
from common.native_floats import NativeFloats, installed
from router.kernels import cpu, reference
from tests.kernels.comparing import ROW_COUNTS, THREAD_COUNTS, assert_close, num_threads, randn, some_rows

KERNELS = pytest.mark.parametrize("kernels", [cpu, rows], ids=["cpu", "torch"])
"""The native kernels where they were built, and what stands in for them elsewhere."""
PER_HEAD = pytest.mark.parametrize("kernels", [installed() or rows, rows], ids=["native", "torch"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

# (in, out): tiny models, odd sizes, and what V2-Lite has.
SMALL_SHAPES = [(64, 64), (64, 32), (32, 64), (64, 24), (7, 33), (24, 40), (120, 24), (58, 2), (8, 1), (1, 8)]
LARGE_SHAPES = [(2048, 576), (1408, 2048)]
SEVERAL_ROW_COUNTS = (1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 64, 127, 129, 513)


def assert_rows_are_their_own(
    function: Callable[..., Tensor], *inputs: Tensor, row_counts: tuple[int, ...] = ROW_COUNTS
) -> None:
    """Compare any rows, in any order, with the same rows of one large call on one thread."""
    total = len(inputs[0])
    with num_threads(1):
        expected = function(*inputs)
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            assert torch.equal(function(*inputs), expected), f"{total} rows, {threads} threads"
            for count in row_counts:
                chosen = some_rows(count * 10 + threads, count, total)
                output = function(*(tensor[chosen] for tensor in inputs))
                assert torch.equal(output, expected[chosen]), f"{count} rows, {threads} threads"


@FLOATS
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_linear_gives_a_row_the_same_bits_in_every_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = randn(1, shape[1], shape[0], dtype=dtype)
    assert_rows_are_their_own(lambda x: rows.linear(x, weight), randn(2, 600, shape[0], dtype=dtype))


@FLOATS
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_linear_gives_a_row_the_same_bits_at_real_sizes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = randn(1, shape[1], shape[0], dtype=dtype)
    x = randn(2, 600, shape[0], dtype=dtype)
    assert_rows_are_their_own(lambda x: rows.linear(x, weight), x, row_counts=SEVERAL_ROW_COUNTS)


def test_linear_in_float16_gives_a_row_the_same_bits_in_every_batch() -> None:
    weight = randn(1, 40, 64, dtype=torch.float16)
    x = randn(2, 600, 64, dtype=torch.float16)
    assert_rows_are_their_own(lambda x: rows.linear(x, weight), x, row_counts=SEVERAL_ROW_COUNTS)


def test_linear_gives_the_same_bits_when_it_must_cut_a_long_batch() -> None:
    weight, x = randn(1, 48, 96), randn(2, 2 * rows.MAX_ROWS + 5, 96)
    assert_rows_are_their_own(lambda x: rows.linear(x, weight), x, row_counts=(1, 700, 1024, 1025, 2050))


def test_linear_gives_the_same_bits_for_rows_at_any_address() -> None:
    weight, x = randn(1, 32, 49), randn(2, 300, 49)
    expected = rows.linear(x, weight)
    for first in range(1, 40):
        assert torch.equal(rows.linear(x[first : first + 70], weight), expected[first : first + 70])
        assert torch.equal(rows.linear(x[first : first + 3], weight), expected[first : first + 3])


@PER_HEAD
@FLOATS
@pytest.mark.parametrize(("heads", "size", "out"), [(1, 16, 32), (2, 7, 33), (4, 16, 24), (16, 128, 512)])
def test_per_head_linear_gives_a_row_the_same_bits_in_every_batch(
    kernels: ModuleType | NativeFloats, heads: int, size: int, out: int, dtype: torch.dtype
) -> None:
    weight, x = randn(1, heads, out, size, dtype=dtype), randn(2, 520, heads, size, dtype=dtype)
    row_counts = ROW_COUNTS if heads * size * out < 10_000 else SEVERAL_ROW_COUNTS[::2]
    assert_rows_are_their_own(lambda x: kernels.per_head_linear(x, weight), x, row_counts=row_counts)


@PER_HEAD
@FLOATS
def test_per_head_linear_takes_a_transposed_view_of_a_part_of_the_weight(
    kernels: ModuleType | NativeFloats, dtype: torch.dtype
) -> None:
    whole = randn(1, 4, 40, 64, dtype=dtype)  # [H, nope + v, C]
    view = whole[:, :24].transpose(1, 2)  # [H, C, nope]
    x = randn(2, 37, 4, 24, dtype=dtype)
    error = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    assert_close(kernels.per_head_linear(x, view), kernels.per_head_linear(x, view.contiguous()), error)
    assert_rows_are_their_own(
        lambda x: kernels.per_head_linear(x, view),
        randn(3, 520, 4, 24, dtype=dtype),
        row_counts=SEVERAL_ROW_COUNTS,
    )


@KERNELS
@FLOATS
@pytest.mark.parametrize("size", [1, 24, 32, 33, 1408])
def test_swiglu_gives_a_row_the_same_bits_in_every_batch(
    kernels: ModuleType, size: int, dtype: torch.dtype
) -> None:
    gate, up = randn(1, 600, size, dtype=dtype) * 5, randn(2, 600, size, dtype=dtype)
    assert_rows_are_their_own(kernels.swiglu, gate, up)


@KERNELS
@FLOATS
@pytest.mark.parametrize("size", [1, 24, 64, 100, 2048])
def test_rms_norm_gives_a_row_the_same_bits_in_every_batch(
    kernels: ModuleType, size: int, dtype: torch.dtype
) -> None:
    weight = randn(1, size, dtype=dtype)
    assert_rows_are_their_own(lambda x: kernels.rms_norm(x, weight, 1e-6), randn(2, 600, size, dtype=dtype))


@pytest.mark.parametrize("size", [3, 8, 64, 160])
def test_softmax_gives_a_row_the_same_bits_in_every_batch(size: int) -> None:
    assert_rows_are_their_own(rows.softmax, randn(1, 600, size) * 4)


def test_softmax_gives_a_row_as_long_as_a_vocabulary_the_same_bits_in_every_batch() -> None:
    assert_rows_are_their_own(rows.softmax, randn(1, 9, 102_400) * 4, row_counts=(1, 2, 3, 8))


@KERNELS
@FLOATS
@pytest.mark.parametrize("size", [1, 24, 100, 2048])
def test_additions_give_a_row_the_same_bits_in_every_batch(
    kernels: ModuleType, size: int, dtype: torch.dtype
) -> None:
    weight = randn(1, size, dtype=dtype)
    x, y = randn(2, 600, size, dtype=dtype), randn(3, 600, size, dtype=dtype)
    device = cpu if kernels is cpu else reference
    assert_rows_are_their_own(lambda x, y: device.add_rms_norm(x.clone(), y, weight, 1e-6), x, y)
    assert_rows_are_their_own(lambda x, y: device.add_routed(x.clone(), y), x, y.float())


@FLOATS
@pytest.mark.parametrize(("heads", "size"), [(1, 8), (3, 6), (16, 64)])
def test_rotate_and_store_gives_a_row_the_same_bits_in_every_batch(
    heads: int, size: int, dtype: torch.dtype
) -> None:
    weight, angles = randn(1, 40, dtype=dtype), randn(2, 600, size // 2)

    def placed(q: Tensor, latents: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, cache = q.clone(), torch.zeros(len(q), 1, latents.shape[1], dtype=dtype)
        cpu.rotate_and_store(q, latents, weight, None, 1e-6, cos, sin, cache, torch.arange(len(q)))
        return torch.cat([q.flatten(1), cache.flatten(1)], dim=1)

    q, latents = randn(3, 600, heads, size + 4, dtype=dtype), randn(4, 600, 40 + size, dtype=dtype)
    assert_rows_are_their_own(placed, q, latents, angles.cos(), angles.sin())


@FLOATS
@pytest.mark.parametrize(("size", "experts"), [(1, 1), (24, 5), (33, 16), (2048, 64)])
def test_gate_logits_give_a_row_the_same_bits_in_every_batch(
    size: int, experts: int, dtype: torch.dtype
) -> None:
    weight = randn(1, experts, size)
    x = randn(2, 520, size, dtype=dtype)
    assert_rows_are_their_own(lambda x: cpu.gate_logits(x, weight), x, row_counts=SEVERAL_ROW_COUNTS)


@FLOATS
def test_all_products_of_no_rows_have_the_right_shape(dtype: torch.dtype) -> None:
    assert rows.linear(torch.empty(0, 7, dtype=dtype), randn(1, 33, 7, dtype=dtype)).shape == (0, 33)
    assert rows.per_head_linear(torch.empty(0, 2, 7, dtype=dtype), randn(1, 2, 5, 7, dtype=dtype)).shape == (
        0,
        2,
        5,
    )
    assert rows.swiglu(torch.empty(0, 7, dtype=dtype), torch.empty(0, 7, dtype=dtype)).shape == (0, 7)
    assert rows.rms_norm(torch.empty(0, 7, dtype=dtype), randn(1, 7, dtype=dtype), 1e-6).shape == (0, 7)
