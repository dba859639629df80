"""Int8 rows and products, bit for bit: against numpy for the rounding, against int64 for the sums."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from common import int8_rows
from common.heap import release_freed_memory
from router.kernels import RouterKernels, cpu, reference
from tests.kernels.comparing import THREAD_COUNTS, num_threads, randn, some_rows

MODULES = pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])

# (in, out): odd and tiny, what V2-Lite has, and rows of R1's largest product, whose sums pass 2**24.
SHAPES = [(1, 1), (3, 5), (7, 33), (64, 32), (100, 18), (1025, 40), (2048, 576), (18432, 24)]


def int8(seed: int, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def sums(rows: Tensor, weight: Tensor) -> Tensor:  # [M, N] int64
    return torch.from_numpy(rows.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T)


@MODULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_is_divided_by_a_127th_of_its_largest_value_and_rounded_to_even(
    module: RouterKernels, dtype: torch.dtype
) -> None:
    x = randn(1, 200, 97, dtype=dtype) * torch.logspace(-6, 6, 200, dtype=dtype).unsqueeze(1)
    rows, scales = module.quantize_rows(x)
    wide = x.float().numpy()
    expected_scales = np.abs(wide).max(axis=1) / np.float32(127)
    assert np.array_equal(scales.numpy(), expected_scales)
    assert np.array_equal(rows.numpy(), np.rint(wide / expected_scales[:, None]).astype(np.int8))
    assert int(rows.abs().amax(dim=1).min()) == 127


@MODULES
def test_halves_go_to_the_even_number_and_zeros_stay_zeros(module: RouterKernels) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    rows, scales = module.quantize_rows(x)
    assert rows.tolist() == [[127, 0, 2, 2, 0, -2], [0, 0, 0, 0, 0, 0]]
    assert scales.tolist() == [1.0, 0.0]


@MODULES
def test_the_smallest_numbers_stay_within_int8(module: RouterKernels) -> None:
    x = torch.tensor([[180.0, -180.0, 90.0]]) * 2.0**-149  # a 127th of them rounds to 1 * 2**-149
    rows, _ = module.quantize_rows(x)
    assert rows.tolist() == [[127, -127, 90]]


@MODULES
def test_static_rows_are_divided_rounded_shifted_and_bounded(module: RouterKernels) -> None:
    x = torch.tensor([[0.0, 0.5, 1.5, -0.5, 1000.0, -1000.0]])
    assert module.quantize_rows_static(x, 1.0, 3.0).tolist() == [[3, 3, 5, 3, 127, -128]]
    assert module.quantize_rows_static(x, 0.25, -3.0).tolist() == [[-3, -1, 3, -5, 127, -128]]


@MODULES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact_and_rounded_once_then_scaled_in_order(
    module: RouterKernels, shape: tuple[int, int]
) -> None:
    weight = int8(1, shape[1], shape[0])
    weight[-1] = -128
    scale, row_scales = randn(2, shape[1]).abs(), randn(3, 40).abs()
    packed = module.pack_int8(weight, scale)
    rows = int8(4, 40, shape[0])
    rows[0] = -128
    expected = sums(rows, weight).float() * scale * row_scales.unsqueeze(1)
    for threads, count in itertools.product(THREAD_COUNTS, (1, 2, 3, 5, 16, 33, 40)):
        with num_threads(threads):
            chosen = some_rows(count, count, 40)
            found = module.int8_linear(rows[chosen], row_scales[chosen], packed)
            assert torch.equal(found, expected[chosen]), (count, threads)
            assert torch.equal(module.int8_linear(rows[:count], row_scales[:count], packed), expected[:count])


@MODULES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_integer_bias_joins_the_sums_before_they_are_rounded(
    module: RouterKernels, shape: tuple[int, int]
) -> None:
    weight, rows, scale = int8(1, shape[1], shape[0]), int8(2, 9, shape[0]), randn(3, shape[1])
    bias = torch.arange(shape[1], dtype=torch.int32) * 1_000_003 - 7
    found = module.int8_linear(rows, None, module.pack_int8(weight, scale, bias))
    assert torch.equal(found, (sums(rows, weight) + bias).float() * scale)


@MODULES
def test_no_rows_give_no_rows(module: RouterKernels) -> None:
    weight, scale = int8(1, 5, 7), torch.ones(5)
    for bias in (None, torch.ones(5, dtype=torch.int32)):
        packed = module.pack_int8(weight, scale, bias)
        rows, row_scales = module.quantize_rows(torch.empty(0, 7))
        assert module.int8_linear(rows, row_scales, packed).shape == (0, 5)


@pytest.mark.parametrize(
    ("pack", "product"),
    [
        (int8_rows._pack_plainly, int8_rows._plain_product),
        *([(int8_rows._pack_onednn, int8_rows._onednn_product)] if int8_rows._is_onednn_exact() else []),
    ],
    ids=lambda function: function.__name__.strip("_"),
)
def test_every_layout_this_machine_may_choose_gives_the_same_bits(
    pack: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    for (num_in, num_out), count in itertools.product(SHAPES, (1, 4, 17)):
        rows, weight, scale = int8(1, count, num_in), int8(2, num_out, num_in), randn(3, num_out)
        expected = sums(rows, weight).float() * scale
        assert torch.equal(product(rows, pack(weight), scale), expected), (num_in, num_out, count)


def test_a_packed_weight_is_held_once() -> None:
    int8_rows.pack_int8(int8(1, 6, 8), torch.ones(6))  # the library itself takes some megabytes
    before = psutil.Process().memory_info().rss
    packed = []
    for seed in range(16):
        packed.append(int8_rows.pack_int8(torch.full((2816, 2048), seed, dtype=torch.int8), torch.ones(2816)))
        release_freed_memory()
    int8_rows.int8_linear(int8(2, 3, 2048), torch.ones(3), packed[-1])
    grown = psutil.Process().memory_info().rss - before
    assert grown < 1.3 * 16 * 2816 * 2048
