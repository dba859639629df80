"""The native argmax: torch's of float32 on every path and at every number of threads, and what is finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common import native_argmax, native_library
from common.native_argmax import NativeArgmax
from tests.kernels.comparing import THREAD_COUNTS, num_threads, randn

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None, reason=str(native_library.why_unavailable())
)
DTYPES = (torch.float32, torch.bfloat16)
PIECE, BLOCK = 8192, 1024
"""Numbers that the kernel looks through at a time, and in one go: argmax.cpp."""
LENGTHS = (*range(1, 40), BLOCK - 1, BLOCK, BLOCK + 1, PIECE - 1, PIECE, PIECE + 3, 2 * PIECE + 5, 102400)
NAN, INF = math.nan, math.inf
LEAST = 2.0**-149
"""The smallest float32; bfloat16 has it not, but numbers as small as 2^-133."""


@pytest.fixture(params=native_library.PATHS)
def kernel(request: pytest.FixtureRequest) -> NativeArgmax:
    """The library on one of its paths."""
    if request.param not in native_library.available_paths():
        pytest.skip(f"this processor has no {request.param}")
    return native_argmax.load(path=request.param)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What logits are."""
    found: torch.dtype = request.param
    return found


def check(kernel: NativeArgmax, rows: Tensor) -> None:
    """Compare with torch's argmax of float32, and what stands there."""
    widened = rows.float()
    expected = widened.argmax(dim=-1, keepdim=True)
    are_finite = widened.gather(-1, expected).isfinite()
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            ids, is_finite = kernel.find(rows)
        assert ids == expected.squeeze(-1).tolist()
        assert is_finite == are_finite.squeeze(-1).tolist()


@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_greatest_of_a_row_of_any_length_is_torchs(
    kernel: NativeArgmax, dtype: torch.dtype, length: int, num_rows: int
) -> None:
    rows = 3 * randn(length, num_rows, length, dtype=dtype)
    check(kernel, rows)
    check(kernel, rows - 100)  # none above zero


def test_the_greatest_of_many_rows_is_torchs(kernel: NativeArgmax, dtype: torch.dtype) -> None:
    check(kernel, randn(1, 600, 1500, dtype=dtype))
    check(kernel, randn(2, 33, 2 * PIECE + 77, dtype=dtype))


@pytest.mark.parametrize("length", [5, 40, BLOCK + 9, 3 * PIECE + 11])
def test_the_greatest_is_found_wherever_it_stands(
    kernel: NativeArgmax, dtype: torch.dtype, length: int
) -> None:
    places = sorted({0, 1, 4, length // 2, BLOCK % length, PIECE % length, length - 2, length - 1})
    for lowest, greatest in ((-2.0, -1.0), (0.0, 1e30), (-INF, -3e38), (-1.0, 0.0), (0.0, INF)):
        rows = torch.full((len(places), length), lowest, dtype=dtype)
        rows[range(len(places)), places] = greatest
        check(kernel, rows)
        ids, _ = kernel.find(rows)
        assert ids == places


def test_of_equal_ones_the_first_is_taken(kernel: NativeArgmax, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for length in (9, 300, 2 * PIECE + 100):
        check(kernel, torch.randint(-3, 3, (20, length), generator=generator).to(dtype))
        check(kernel, torch.zeros(3, length, dtype=dtype))
    row = torch.zeros(1, 3 * PIECE, dtype=dtype)
    row[0, [PIECE + 5, PIECE + 900, 2 * PIECE + 1]] = 1
    assert kernel.find(row)[0] == [PIECE + 5]


@pytest.mark.parametrize("distance", [1, BLOCK, PIECE])
def test_minus_zero_equals_zero(kernel: NativeArgmax, dtype: torch.dtype, distance: int) -> None:
    rows = torch.full((2, 2 * PIECE), -1.0, dtype=dtype)
    for row, first in enumerate((-0.0, 0.0)):
        rows[row, 7], rows[row, 7 + distance] = first, -first
    check(kernel, rows)
    assert kernel.find(rows)[0] == [7, 7]


def test_numbers_next_to_zero_are_told_from_it(kernel: NativeArgmax, dtype: torch.dtype) -> None:
    least = LEAST if dtype is torch.float32 else 2.0**-133
    rows = torch.tensor([[0.0, least, -least], [-least, -0.0, -2 * least], [-2 * least, -least, -1]])
    rows = rows.to(dtype)
    assert rows[0, 1] != 0
    check(kernel, rows)
    assert kernel.find(rows)[0] == [1, 1, 1]


def test_a_row_with_nan_or_infinity_or_nothing_else_than_minus_infinity_is_not_finite(
    kernel: NativeArgmax, dtype: torch.dtype
) -> None:
    length = 2 * PIECE + 19
    rows = randn(1, 16, length, dtype=dtype)
    for row, place in enumerate((0, 17, BLOCK + 2, PIECE - 1, PIECE, length - 1)):
        rows[row, place] = NAN
        rows[row, length - 1] = (NAN, -NAN, INF)[row % 3] if place < length - 1 else NAN
    rows[6, 3] = -torch.tensor(NAN)
    rows[7, PIECE + 3] = INF
    rows[8] = -INF
    rows[9] = NAN
    rows[10, 100], rows[10, 50] = NAN, INF
    rows[11, [3, PIECE + 1]] = INF
    rows[12] = -INF
    rows[12, 70] = -3e38
    rows[13, 8:] = -INF
    check(kernel, rows)
    assert kernel.find(rows)[1] == 12 * [False] + 4 * [True]


def test_every_bfloat16_has_its_place_among_the_others(kernel: NativeArgmax) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    shuffled = every[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(3))]
    pairs = torch.stack((every, shuffled), dim=1)
    for dtype in DTYPES:
        check(kernel, pairs.to(dtype))
        check(kernel, every.to(dtype)[None])


def test_rows_may_be_views_and_there_may_be_none(kernel: NativeArgmax, dtype: torch.dtype) -> None:
    rows = randn(1, 50, 300, dtype=dtype)
    for view in (rows[::7, 13:200], rows.T, rows[:, ::3], rows[0].expand(4, 300), rows[:0]):
        check(kernel, view)


def test_what_the_kernel_would_read_as_something_else_is_refused(kernel: NativeArgmax) -> None:
    for wrong in (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"give \[B, V\] of float32 or bfloat16"):
            kernel.find(wrong)
